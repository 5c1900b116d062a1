"""Narrow the parts of LLM systems to their concrete types, which the registry does not expose."""

from __future__ import annotations

from trainer.data.collators.retrieval import RetrievalCollator
from trainer.models import AnySystem
from trainer.models.llm.retrieval import LLM4Rec


def retrieval_parts(system: AnySystem) -> tuple[LLM4Rec, RetrievalCollator]:
    """Model and collator of a system with task=retrieval."""
    assert isinstance(system.model, LLM4Rec)
    assert isinstance(system.collator, RetrievalCollator)
    return system.model, system.collator
