"""Helpers shared by the builders of the systems that read text.

Letters: N texts, F width of the text encoder.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.data.collators.base import BatchRows, to_device
from trainer.data.encoder_texts import TokenLists
from trainer.nn.text_encoder import TextVectors
from trainer.runs.folder import Checkpoint, CheckpointError
from trainer.runs.requirements import SectionT, SourceRun


@torch.no_grad()
def encode_texts(reader: TextVectors, texts: TokenLists, batch_size: int, device: torch.device) -> Tensor:
    """(N, F) vectors of all texts; texts of similar length share a batch, for less padding."""
    reader.to(device).eval()
    order = texts.length_N.argsort(kind="stable")
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    parts = [reader(to_device(texts.padded(batch, BatchRows(0, len(batch), len(batch))), device)) for batch in batches]
    vector_NF = torch.empty(len(order), reader.encoder.dim, device=device)
    vector_NF[torch.from_numpy(order).to(device)] = torch.cat(parts)
    return vector_NF


def check_same_encoder(key: str, run: SourceRun[SectionT], fingerprint: str) -> None:
    """Check that the run `system.<key>` started from the same encoder.

    Raises:
        CheckpointError: it started from a different one.
    """
    if run.checkpoint.identity.llm != fingerprint:
        raise CheckpointError(
            f"system.{key}={run.path} was trained with a different encoder than system.encoder: "
            f"set system.encoder as in {run.path / 'config.yaml'}"
        )


def weights_below(prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights of the part of a model whose names start with `prefix`, by their names within it."""
    saved = load_file(checkpoint.weights)
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
