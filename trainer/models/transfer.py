"""A trained system on the items of another dataset, none of which it was trained on (KDD'25, Table 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import ConfigError, LLM4RecConfig, RunConfig, SASRecConfig, UnseenItems
from trainer.data.reading.dataset import Dataset
from trainer.models.by_id.build import sequence_collator
from trainer.models.by_id.sasrec import SASRec
from trainer.models.scoring import VectorScoring
from trainer.models.system import AnySystem


def on_another_catalog(
    config: RunConfig, system: AnySystem, dataset: Dataset, unseen: UnseenItems
) -> VectorScoring[Any, Any]:
    """The scoring of a trained system for the items of `dataset`; changes the system's item table in place.

    Args:
        unseen: what stands for the vector of an item: the `mean` of the trained items, `zero`, or a `random` vector
            with their mean and standard deviation.

    Raises:
        ConfigError: the system cannot score items that it does not know.
    """
    scoring = system.vectors
    match config.system:
        case SASRecConfig() as section:
            _replace_items(scoring.model, dataset.num_items, unseen)
            return VectorScoring(scoring.model, sequence_collator(section, dataset, config.seed))
        case LLM4RecConfig() as section:
            # transformers takes seconds to import
            from trainer.models.llm.build import prompt_collator, title_tokens
            from trainer.models.llm.titled_teacher import TitledTeacher

            if section.llm.title_store is not None:
                raise ConfigError("system.llm.title_store is of the run's own titles: train the run without it")
            reader = getattr(scoring.model, "reader")  # noqa: B009 - known to the model's builder alone
            teacher = reader.teacher
            if isinstance(teacher, TitledTeacher):
                teacher.replace_titles(reader.llm.token_table(), title_tokens(section, dataset))
                teacher = teacher.sasrec
            if teacher is not None:
                _replace_items(teacher, dataset.num_items, unseen)
            collator: Any = prompt_collator(config, section, dataset, teacher.config if teacher else None)
            return VectorScoring(scoring.model, collator, scoring.costly_items)
        case other:
            raise ConfigError(
                f"{other.name} cannot be evaluated on another dataset yet: use sasrec, or an LLM recommender"
            )


@torch.no_grad()
def _replace_items(model: object, num_items: int, unseen: UnseenItems) -> None:
    """A table of `num_items` items and padding."""
    assert isinstance(model, SASRec)
    trained_ND = model.items.weight[1:]
    mean_1D = trained_ND.mean(0, keepdim=True)
    row_ND = mean_1D.expand(num_items, -1).clone()
    if unseen == "zero":
        row_ND.zero_()
    if unseen == "random":
        generator = torch.Generator().manual_seed(0)
        noise_ND = torch.randn(row_ND.shape, generator=generator).to(row_ND.device)
        row_ND += noise_ND * trained_ND.std(0, keepdim=True)
    model.items = nn.Embedding(1 + num_items, row_ND.shape[1], _weight=torch.cat([torch.zeros_like(mean_1D), row_ND]))
    model.num_items = num_items
