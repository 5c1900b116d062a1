"""Programs with a fault, on which a trace must report it; each is given a tensor of (4, 8) on the fake device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fake_trace import Trace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional


def _held(x: Tensor) -> None:
    doubled = x * 2
    (doubled + x).sum()


def _freed(x: Tensor) -> None:
    x = x * 2
    x = x * 2  # two of them are alive while the second is computed
    x = x * 2


FAULTS: Mapping[str, Callable[[Tensor], object]] = {
    "item": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "branch": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean rows": lambda x: x[:, x[0] > 0],
    "masked assignment": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "equal": lambda x: torch.equal(x, x),
    "copy to host": lambda x: x.to("cpu"),
    "late copy to host": lambda x: torch.empty(4, 8).copy_(x, non_blocking=True),
    "scalar to device": lambda x: torch.tensor([1.0], device=x.device),
    "pageable copy": lambda x: torch.ones(4, 8).to(x.device),
    "asynchronous copy": lambda x: torch.ones(4, 8).to(x.device, non_blocking=True),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "host index": lambda x: x[torch.zeros(2, dtype=torch.long)],
    "host operand": lambda x: x + torch.ones(4, 8),
    "host scalar": lambda x: x + torch.ones(()),
    "views": lambda x: x.view(8, 4).t()[1:].detach(),
    "fused norm": lambda x: functional.rms_norm(x, (8,), x.new_ones(8), 1e-5),
    "held": _held,
    "freed": _freed,
}


def run_fault(name: str) -> dict[str, Any]:
    """Report of a trace on the program."""
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda:0")
        trace = Trace()
        with trace:
            trace.register([x])
            FAULTS[name](x)
    named = ("peak", "live", "waits", "mixed", "kernels", "copied")
    return {name: getattr(trace, name) for name in named}
