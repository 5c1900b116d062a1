"""A trained system on histories with items that its catalog does not have, of which only the titles are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainer.config import RunConfig, TALLRecConfig
from trainer.config.text_systems import RecformerConfig, RecformerPretrainConfig
from trainer.data.reading.dataset import Dataset
from trainer.models.scoring import VectorScoring
from trainer.models.system import AnySystem


def reading_new_titles(
    config: RunConfig, system: AnySystem, dataset: Dataset, titles: Sequence[str]
) -> VectorScoring[Any, Any]:
    """The system's scoring for histories that also hold items N + 1, N + 2, ... with these titles.

    Only histories may hold them: the vectors of items 1 to N are unchanged.

    Args:
        config: of a system that `reads_titles_alone`.
    """
    scoring = system.vectors
    match config.system:
        case TALLRecConfig() as section:
            from trainer.models.llm.build import prompt_collator  # transformers takes seconds to import

            manifest = replace(dataset.manifest, num_items=dataset.num_items + len(titles))
            longer = replace(dataset, titles=(*dataset.titles, *titles), manifest=manifest)
            collator: Any = prompt_collator(config, section, longer, None)
        case RecformerConfig() | RecformerPretrainConfig() as section:
            from trainer.models.by_text.build import catalog_attributes, recformer_writer

            items = [*catalog_attributes(section, dataset), *({"title": title} for title in titles)]
            own: Any = scoring.collator
            collator = replace(own, writer=recformer_writer(section, items))
        case _:
            raise AssertionError(f"{config.system.name} does not read titles alone")
    return VectorScoring(scoring.model, collator, scoring.costly_items)
