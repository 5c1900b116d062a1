"""Submit runs to Slurm: `python launchers/slurm/submit.py a6000 PRESET.yaml section.key=value ... --nodes 2`.

`--experiment table3 --data DIR` in place of a preset submits all runs of an experiment: an array of those that build on
no other, then one of those that build on them, and so on.

Runs the preflight on the login node, without torch, copies code and configuration into the run folder and calls sbatch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launchers.command import run_command
from launchers.slurm.options import build_parser, jobs_of
from trainer.workflows.slurm_job import preview, submit


def main(arguments: Sequence[str], prog: str = "submit.py") -> None:
    """Check, write and submit; with `--dry-run` only print what would be written and run."""
    options = build_parser(prog, __doc__.split("\n")[0]).parse_intermixed_args(arguments)
    jobs = jobs_of(options)
    if options.dry_run:
        sys.stdout.write("\n".join(map(preview, jobs)))
        return
    before = None
    for job in jobs:
        before = submit(job, before)
        sys.stdout.write(f"job {before}: {len(job.configs)} run(s), output in {job.folder}/\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
