"""Order audit of a RecBole model: write the arrays, then `llm-srec audit --arrays FILE`.

    python examples/audit_recbole.py saved/SASRec-Dec-01-2026.pth arrays.npz
    llm-srec audit --arrays arrays.npz --name SASRec

RecBole is not a dependency of this package: run the first command in its environment, which needs numpy and torch only.
Works for models with `forward(item_seq, item_seq_len)` and a table `item_embedding`, as SASRec, GRU4Rec and NARM have.

Letters: U users, L positions, D width of the vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def shuffled(item_UL: Tensor, length_U: Tensor, generator: torch.Generator) -> Tensor:
    """Each user's items in random order; RecBole pads behind them."""
    key_UL = torch.rand(item_UL.shape, generator=generator).to(item_UL.device)
    key_UL[torch.arange(item_UL.shape[1], device=item_UL.device) >= length_U[:, None]] = 2.0  # padding stays last
    return item_UL.gather(1, key_UL.argsort(dim=1))


@torch.no_grad()
def arrays(model: Any, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> dict[str, Any]:
    """The arrays of an audit (docs/audit.md).

    Args:
        batches: with RecBole's fields `item_id_list` (U, L), `item_length` (U,) and `item_id` (U,), the target.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("target", "history", "user_vectors")}
    parts["user_vectors_shuffled"] = []
    for batch in batches:
        item_UL, length_U = batch["item_id_list"], batch["item_length"]
        parts["target"].append(batch["item_id"])
        parts["history"].append(item_UL)
        parts["user_vectors"].append(model.forward(item_UL, length_U))
        parts["user_vectors_shuffled"].append(model.forward(shuffled(item_UL, length_U, generator), length_U))
    found = {name: torch.cat(tensors).cpu().numpy() for name, tensors in parts.items()}
    # Row 0 is RecBole's padding.
    return {**found, "item_vectors": model.item_embedding.weight[1:].float().cpu().numpy()}


def main(checkpoint: str, out: str) -> None:
    """Load a RecBole checkpoint with its data, and write the arrays."""
    from recbole.quick_start import load_data_and_model

    _, model, _, _, _, test_data = load_data_and_model(checkpoint)
    batches = (batch[0].to(next(model.parameters()).device) for batch in test_data)
    found: dict[str, Any] = arrays(model, batches)
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
