"""Item vectors of the best checkpoint, kept in its run folder: encoding a catalog with an LLM takes minutes to hours.

Evaluation uses the file only where encoding again would give the same bits, and otherwise replaces it. Recommendations
also use vectors that were only rounded otherwise: on another number of ranks, another device or another release.

Letters: N items of the catalog, D width of the vectors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.manifest import parse_json
from trainer.distributed import World
from trainer.evaluation.rankers import Batches
from trainer.models.scoring import VectorScoring
from trainer.runs.atomic import atomic_file

log = logging.getLogger(__name__)

_NAME = "item_vectors"
_ORIGIN = "origin"
"""Key of the metadata: the sha256 of the vectors, a space, the facts. One entry, because safetensors writes several in
random order."""


@dataclass(frozen=True)
class ItemVectorFile:
    """A file of item vectors (N, D) in fp32."""

    path: Path
    facts: Mapping[str, object]
    """Everything that decides the vectors bit for bit, as JSON; a file with other facts is not used."""
    rounding: tuple[str, ...] = ()
    """Keys of `facts` that decide no more than how the vectors are rounded."""
    exact: bool = True
    """Whether a file whose facts differ in `rounding` is used neither."""

    def read(self, num_items: int, world: World) -> Tensor | None:
        """(N, D) vectors on this rank's device, or None on all ranks if one of them cannot use its file.

        Collective. Every rank reads the file itself, because the vectors of a large catalog are cheaper to read than to
        send.
        """
        vector_ND = self._intact(num_items)
        usable_R = world.all_gather_value(float(vector_ND is not None))
        if vector_ND is None or not all(usable_R):
            return None
        log.info("item vectors read from %s", self.path)
        return vector_ND.to(world.device)

    def write(self, vector_ND: Tensor, world: World) -> None:
        """Replace the file, on rank 0. A folder that cannot be written is no error: it only costs encoding again."""
        if not world.is_main:
            return
        rows_ND = vector_ND.cpu().contiguous()
        try:
            with atomic_file(self.path) as beside:
                save_file({_NAME: rows_ND}, beside, {_ORIGIN: f"{_sha256(rows_ND)} {self._facts}"})
        except (OSError, SafetensorError) as error:
            log.warning("item vectors cannot be kept in %s, the next command encodes them again: %s", self.path, error)
        else:
            log.info("item vectors kept in %s", self.path)

    def _intact(self, num_items: int) -> Tensor | None:
        """The file's vectors; None if there is no file, it belongs to something else, or it is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                sha256, _, facts = (file.metadata() or {}).get(_ORIGIN, "").partition(" ")
                if not self._belongs(facts):
                    return None
                vector_ND: Tensor = file.get_tensor(_NAME).clone()  # not mapped: the file may be replaced
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged, its item vectors are encoded again: %s", self.path, error)
            return None
        kind = (vector_ND.dtype, vector_ND.ndim, len(vector_ND))
        if kind != (torch.float32, 2, num_items) or _sha256(vector_ND) != sha256:
            log.warning("%s is damaged, its item vectors are encoded again", self.path)
            return None
        return vector_ND

    def _belongs(self, facts: str) -> bool:
        """Whether a file with these facts holds the wanted vectors."""
        if self.exact or facts == self._facts:
            return facts == self._facts
        try:
            found = parse_json(facts)
        except ValueError:
            return False
        wanted = json.loads(self._facts)
        return isinstance(found, dict) and all(found.get(k) == v for k, v in wanted.items() if k not in self.rounding)

    @property
    def _facts(self) -> str:
        return json.dumps(self.facts, sort_keys=True)


def item_vectors(
    scoring: VectorScoring[Any, Any], num_items: int, batches: Batches, kept: ItemVectorFile | None = None
) -> Tensor:
    """(N, D) vectors of items 1 to N at the model's current weights, complete on every rank; collective.

    Args:
        kept: file for the vectors of these weights: read if it has them, else written. None: encode them.
    """
    if kept is not None and (found_ND := kept.read(num_items, batches.world)) is not None:
        return found_ND
    vector_ND = batches.encode_catalog(num_items, scoring.item_vectors)
    if kept is not None:
        kept.write(vector_ND, batches.world)
    return vector_ND


def _sha256(vector_ND: Tensor) -> str:
    return hashlib.sha256(vector_ND.numpy().data).hexdigest()
