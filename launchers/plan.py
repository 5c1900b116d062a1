"""Estimate memory and time of a run: `launchers/plan.py PRESET.yaml --devices 8 --kind a6000 section.key=value ...`.

Tokens are counted in real batches of the run's dataset, with the LLM's tokenizer; of the LLM only config.json is read.
A system by id takes one real step with a few users, which is scaled.
Runs that the system builds on (a teacher, a first stage) need not be trained yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from launchers.command import CommandParser, exit_process, run_command
from trainer.config import LLM4RecConfig, load_config
from trainer.planner.devices import DeviceKind
from trainer.runs.requirements import check_id_plannable, check_plannable, check_task


def main(arguments: Sequence[str], prog: str = "plan.py") -> None:
    """Print the plan as text or JSON."""
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, or the name of a preset, such as llm_srec")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--devices", type=int, default=1, help="number of devices, all of one node")
    parser.add_argument("--kind", choices=get_args(DeviceKind), required=True)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.preset, options.overrides)
    check_task(config, config.task, config.evaluation)
    facts = {"devices": options.devices, "kind": options.kind}
    if not isinstance(config.system, LLM4RecConfig):
        check_id_plannable(config, options.devices)

        from trainer.planner.id_plan import id_plan_text, plan_id_run

        by_id = plan_id_run(config, options.kind, options.devices)
        print(json.dumps(facts | asdict(by_id.forecast), indent=1) if options.json else id_plan_text(by_id))
        return
    check_plannable(config, options.devices)

    from trainer.planner.plan import plan_run
    from trainer.planner.text import plan_text

    plan = plan_run(config, options.kind, options.devices)
    if options.json:
        print(json.dumps(facts | {"llm": asdict(plan.shape)} | asdict(plan.forecast), indent=1))
    else:
        print(plan_text(plan))


if __name__ == "__main__":
    exit_process(run_command(main))
