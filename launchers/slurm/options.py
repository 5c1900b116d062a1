"""Command line options of `submit.py`, and the job they describe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from launchers.command import CommandParser
from launchers.experiment_options import add_experiment_options, asked_of
from trainer.config import ConfigError, RunConfig, load_config, with_absolute_paths
from trainer.runs.preflight import preflight
from trainer.workflows.comparing.sweep import sweep
from trainer.workflows.experiments.experiment import prepare
from trainer.workflows.experiments.running import levels_of
from trainer.workflows.slurm_job import CLUSTERS, Cluster, Job, mounts


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Run the preflight of each run and describe their jobs, each of which starts after the one before; writes nothing.

    Raises:
        ValueError: a run cannot start; the message names the thing and the cure.
    """
    cluster = CLUSTERS[options.cluster]
    ranks = options.nodes * (options.per_node or cluster.devices)
    # Check for the nodes' device, not for that of the login node.
    os.environ["DS_ACCELERATOR"] = "cpu" if options.cpu else cluster.accelerator
    if (options.preset is None) == (options.experiment is None):
        raise ConfigError("give a preset, or --experiment NAME --data DIR")
    if options.experiment is None:
        return [_of_preset(options, ranks)]
    if options.sweep or options.overrides:
        raise ConfigError("--experiment: change settings by --set section.key=value, not by --sweep or overrides")
    plan = prepare(asked_of(options.experiment, options), ranks)
    root = options.runs.absolute()
    levels = [[with_absolute_paths(run.config) for run in level] for level in levels_of(plan.runs)]
    if not levels:
        raise ConfigError(f"all runs are done: print the results with experiment.py {options.experiment}")
    return [_job(options, root, f"-{number}", level, array=True) for number, level in enumerate(levels)]


def _of_preset(options: argparse.Namespace, ranks: int) -> Job:
    """The job of a run, or of the runs of a sweep."""
    base = load_config(options.preset, options.overrides).output.absolute()
    configs = []
    for name, words in sweep(options.sweep):
        config = load_config(options.preset, [*options.overrides, *words, f"output={base / name}"])
        preflight(config, ranks)
        configs.append(with_absolute_paths(config))
    return _job(options, base, "", configs, array=bool(options.sweep))


def _job(options: argparse.Namespace, base: Path, suffix: str, configs: Sequence[RunConfig], *, array: bool) -> Job:
    """The job of these runs, whose folder is in `base`."""
    cluster = CLUSTERS[options.cluster]
    devices = options.per_node or cluster.devices
    folder = base / "slurm" / (datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f") + suffix)
    container = "apptainer" if options.apptainer else "pyxis" if options.pyxis else "none"
    environment = {
        "PYTHON": _interpreter(options.python or (sys.executable if container == "none" else "python3")),
        "DS_ACCELERATOR": os.environ["DS_ACCELERATOR"],
        "CONTAINER": container,
        "IMAGE": options.apptainer or options.pyxis or "",
        "MOUNTS": mounts(base, configs),
    }
    command = _command(options, cluster, devices, folder, len(configs) if array else None)
    return Job(folder, tuple(configs), environment, tuple(command))


def _interpreter(name: str) -> str:
    """Make a path absolute, without resolving links: the interpreter of a virtual environment is a link."""
    return os.path.abspath(name) if "/" in name else name


def _command(options: argparse.Namespace, cluster: Cluster, devices: int, folder: Path, runs: int | None) -> list[str]:
    """The sbatch command; of an array of `runs`, None: of a single run."""
    words = [
        "sbatch", "--parsable", f"--nodes={options.nodes}", f"--ntasks-per-node={devices}",
        f"--cpus-per-task={options.cpus_per_task or cluster.cpus}", f"--time={options.time}",
        f"--job-name={folder.parents[1].name}", f"--output={folder}/{'%j' if runs is None else '%A_%a'}.out",
    ]  # fmt: skip
    if options.mem or (not options.cpu and devices >= cluster.devices):
        # A job with all devices of its nodes gets all their memory; many sites' default is too little for an LLM.
        words.append(f"--mem={options.mem or 0}")
    if not options.cpu:
        words.append(f"--gres={options.gres or f'{cluster.gres}:{devices}'}")
    if options.partition:
        words.append(f"--partition={options.partition}")
    if options.account:
        words.append(f"--account={options.account}")
    if runs is not None:
        words.append(f"--array=0-{runs - 1}" + (f"%{options.at_once}" if options.at_once else ""))
    return [*words, *options.sbatch, f"{folder}/code/launchers/slurm/{options.cluster}.sbatch", str(folder)]


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Build the argument parser of `submit.py`."""
    parser = CommandParser(prog=prog, description=description)
    parser.add_argument("cluster", choices=sorted(CLUSTERS))
    parser.add_argument("preset", type=Path, nargs="?", help="YAML file, or the name of a preset, such as llm_srec")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--dry-run", action="store_true", help="print the files and the sbatch command; write nothing")
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1)
    size.add_argument("--per-node", type=int, help="ranks, and so devices, per node (default a6000: 4, gaudi: 8)")
    size.add_argument("--cpus-per-task", type=int, help="cores per rank (default a6000: 8, gaudi: 16)")
    size.add_argument(
        "--mem", help="memory per node, such as 200G (default: all of it with all devices of a node, else the site's)"
    )
    size.add_argument("--time", default="24:00:00", help="time limit; longer runs save, stop and are requeued")
    size.add_argument("--gres", help="this site's name for the devices, for example gpu:rtx_a6000:4")
    size.add_argument("--cpu", action="store_true", help="ranks on CPUs without devices, to try out a cluster")
    site = parser.add_argument_group("site")
    site.add_argument("--partition")
    site.add_argument("--account")
    site.add_argument(
        "--sbatch", action="append", default=[], metavar="WORD", help="an option for sbatch: --sbatch=--qos=high"
    )
    site.add_argument("--python", help="interpreter on the nodes (default: this one; python3 in a container)")
    image = site.add_mutually_exclusive_group()
    image.add_argument("--apptainer", metavar="IMAGE.sif", help="run the ranks in this Apptainer image")
    image.add_argument("--pyxis", metavar="IMAGE", help="run the ranks in this image through pyxis and enroot")
    many = parser.add_argument_group("sweep")
    many.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V1,V2", help="job array over the values; repeat for a grid"
    )
    many.add_argument("--at-once", type=int, help="runs of the array at the same time")
    many.add_argument(
        "--experiment", type=Path, metavar="NAME", help="instead of a preset: all runs of an experiment that are left"
    )
    add_experiment_options(parser)
    return parser
