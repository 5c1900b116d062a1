"""Submit a run to Slurm: `python launchers/slurm/submit.py a6000 PRESET.yaml section.key=value ... --nodes 2`.

Runs the preflight on the login node, without torch, copies code and configuration into the run folder and calls sbatch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launchers.command import run_command
from launchers.slurm.options import build_parser, job_of
from trainer.workflows.slurm_job import preview, submit


def main(arguments: Sequence[str], prog: str = "submit.py") -> None:
    """Check, write and submit; with `--dry-run` only print what would be written and run."""
    options = build_parser(prog, __doc__.split("\n")[0]).parse_intermixed_args(arguments)
    job = job_of(options)
    if options.dry_run:
        sys.stdout.write(preview(job))
        return
    job_id = submit(job)
    sys.stdout.write(f"job {job_id}: {len(job.configs)} run(s), output in {job.folder}/\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
