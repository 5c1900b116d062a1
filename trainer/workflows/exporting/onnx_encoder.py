"""The user encoder of a system that knows items by id, as ONNX: any runtime computes user vectors from item numbers.

Letters: B users, L positions, D width, H heads, d width of a head.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.id_systems import BERT4RecConfig, SASRecConfig
from trainer.data.collators.base import BatchRows, ItemSequences
from trainer.models.by_id.sasrec import SASRec
from trainer.nn.causal_attention import CausalAttention
from trainer.workflows.load_run import LoadedRun


def write_user_encoder(run: LoadedRun, path: Path) -> None:
    """Write `items` (B, L) int64 to `user_vectors` (B, D) for any number of users.

    L is what the system reads (`system.max_length`, for BERT4Rec one less): histories of item numbers, 1 for the first
    row of `items.parquet`, the latest last, left-padded with 0.
    """
    encoder = user_encoder(run)
    length: int = run.system.vectors.collator.max_history
    example_BL = torch.arange(2 * length).view(2, length) % run.dataset.num_items + 1
    rows = torch.export.Dim("users", min=1, max=2**20)
    # The exporter narrates its steps, and warns about libraries that are not there and about torch's own code.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            encoder,
            (example_BL,),
            path,
            input_names=["items"],
            output_names=["user_vectors"],
            dynamic_shapes=({0: rows},),
            external_data=False,
            dynamo=True,
        )


def user_encoder(run: LoadedRun) -> nn.Module:
    """A module from (B, L) padded item ids to (B, D) user vectors, in operations that ONNX has."""
    model = run.system.vectors.model
    if isinstance(model, SASRec):
        return _PlainSASRec(model).eval()
    mask = run.dataset.num_items + 1 if isinstance(run.config.system, BERT4RecConfig) else None
    return _Encoder(model, mask).eval()  # type: ignore[arg-type]


class _Encoder(nn.Module):
    """A model whose `user_vectors` are plain operations; BERT4Rec reads a mask behind the latest item."""

    def __init__(self, model: nn.Module, mask: int | None) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, item_BL: Tensor) -> Tensor:
        if self.mask is not None:
            item_BL = torch.cat([item_BL, torch.full_like(item_BL[:, :1], self.mask)], dim=1)
        vector_BD: Tensor = self.model.user_vectors(ItemSequences(item_BL, BatchRows(0, 1, 1)))  # type: ignore[operator]
        return vector_BD


class _PlainSASRec(nn.Module):
    """SASRec over padded rows: its own computation sorts users into buckets, by values that ONNX cannot branch on."""

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, item_BL: Tensor) -> Tensor:
        model, config = self.model, self.model.config
        assert isinstance(config, SASRecConfig)
        real_BL1 = (item_BL > 0)[:, :, None]
        hidden_BLD = model.positions.weight + model.items(item_BL) * config.dim**0.5
        # Padding that attention sees is zero before each block; elsewhere no position sees it.
        seen_BL1 = torch.ones_like(real_BL1) if config.mask_padding else real_BL1
        causal_LL = torch.ones(item_BL.shape[1], item_BL.shape[1], dtype=torch.bool, device=item_BL.device).tril()
        itself_LL = torch.eye(item_BL.shape[1], dtype=torch.bool, device=item_BL.device)
        key_B1L = real_BL1.transpose(1, 2) if config.mask_padding else torch.ones_like(real_BL1.transpose(1, 2))
        # Padding may attend to itself: a row of attention without any key would be NaN.
        visible_B1LL = (causal_LL & (key_B1L | itself_LL))[:, None]
        hidden_BLD = hidden_BLD * seen_BL1
        for block in model.blocks:
            attend = partial(_attention, block.attention, visible_B1LL)  # type: ignore[arg-type]
            hidden_BLD = block._layers(hidden_BLD, None, lambda x: x, attend) * seen_BL1  # type: ignore[operator]
        vector_BD: Tensor = model.norm(hidden_BLD[:, -1] * real_BL1[:, -1])
        return vector_BD


def _attention(attention: CausalAttention, visible_B1LL: Tensor, query_BLD: Tensor, memory_BLD: Tensor) -> Tensor:
    """`CausalAttention` without dropout, over padded rows."""
    parts = (attention.query(query_BLD), attention.key(memory_BLD), attention.value(memory_BLD))
    q_BHLd, k_BHLd, v_BHLd = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in parts)
    mixed_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, attn_mask=visible_B1LL)
    mixed_BLD: Tensor = attention.out(mixed_BHLd.transpose(1, 2).flatten(2))
    return mixed_BLD
