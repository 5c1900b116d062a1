"""Runs scenarios on fake CUDA devices: `fake_worker.py LIBRARY`, with a scenario per line of stdin, as JSON.

Answers each line with a line of JSON: what `fake_step.run` returns, or `{"error": ...}`. One process for all of them,
because imports take several seconds. A line `{"fault": NAME}` runs a program of `fake_faults.py` instead.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from fake_device import load_library

load_library(Path(sys.argv[1]))  # before torch
os.environ["DS_ACCELERATOR"] = "cuda"

import peft  # noqa: E402, F401 - it imports bitsandbytes, which would take the fake device for a real one
import torch  # noqa: E402
from fake_faults import run_fault  # noqa: E402
from fake_step import Scenario, run  # noqa: E402
from fake_torch import install  # noqa: E402


def main() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    install()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            found = run_fault(asked["fault"]) if "fault" in asked else run(Scenario(**asked))
        except Exception:  # noqa: BLE001 - whatever a step raises is the result of its test
            found = {"error": traceback.format_exc()[-4000:]}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
