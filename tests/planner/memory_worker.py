"""Prints the peak memory growth of a training step, in bytes: `memory_worker.py CONFIG.json ...`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from trainer.config import load_config
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import epoch_batches
from trainer.models import build_system


def _anonymous() -> int:
    """Resident bytes of this process that no file backs: the kernel loads and evicts pages of libraries at will."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class _Peak(threading.Thread):
    """Samples the memory of this process and keeps its peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = _anonymous()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, _anonymous())


def _peak_growth(preset: Path) -> int:
    """Warm up on one user, then measure a whole batch."""
    config = load_config(preset, [])
    dataset = open_dataset(config.data.path, full_check=False)
    system = build_system(config, dataset)
    model: Any = system.model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    users = next(
        epoch_batches(
            dataset.path, dataset.manifest, batch_size=config.train.batch_size, shuffle_shards=2, seed=0, epoch=0
        )
    )
    with torch.no_grad():
        model(system.collator.train(users, slice(0, 1), 0))
    peak = _Peak()
    peak.start()
    terms = model(system.collator.train(users, slice(0, len(users)), 0))
    torch.autograd.backward(model.loss(terms).total)
    optimizer.step()
    peak.over.set()
    peak.join()
    return peak.most - peak.before


def main() -> None:
    """One line per configuration, each measured in a fork: what an earlier one left in the allocator would count."""
    torch.set_num_threads(1)
    for preset in sys.argv[1:]:
        if (child := os.fork()) == 0:
            print(_peak_growth(Path(preset)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, preset


if __name__ == "__main__":
    main()
