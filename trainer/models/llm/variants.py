"""TALLRec, LLaRA, CoLLM, A-LLMRec and LLM-SRec as rows of one table: how they differ in the LLM-SRec paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config import (
    ALLMRecConfig,
    CoLLMConfig,
    LLaRAConfig,
    LLM4RecConfig,
    LLMSRecConfig,
    LoRAConfig,
    TALLRecConfig,
)


@dataclass(frozen=True)
class Variant:
    """Vectors that a system injects into its prompts, and what it trains besides the parts that all systems have."""

    items: Literal["titles", "table", "stage1"]
    """Items are titles alone, or titles and vectors: f_I of the teacher's item table, or of its stage-1 encoding."""
    user_vector: bool | Literal["end"]
    """Inject Z_u = f_U(teacher's user vector) at the start of the user prompt, or behind its history."""
    lora: LoRAConfig | None
    """Adapters in the LLM; None: without."""
    distillation: LLMSRecConfig | None
    """Losses against the teacher's user vector; None: without."""
    shared_projector: bool = False
    """One MLP is both f_I and f_U."""
    curriculum_steps: int | None = None
    """Steps over which training moves from titles alone to prompts with item vectors; None: vectors always."""

    @property
    def item_slots(self) -> bool:
        """Whether an item's vector follows its title."""
        return self.items != "titles"


def variant_of(system: LLM4RecConfig) -> Variant:
    """The system's row of the table."""
    match system:
        case TALLRecConfig():
            return Variant("titles", user_vector=False, lora=system.lora, distillation=None)
        case LLaRAConfig():
            steps = system.curriculum_steps
            return Variant("table", user_vector=False, lora=system.lora, distillation=None, curriculum_steps=steps)
        case CoLLMConfig():
            shared = system.projectors == "shared"
            return Variant("table", user_vector=True, lora=system.lora, distillation=None, shared_projector=shared)
        case ALLMRecConfig():
            return Variant("stage1", user_vector=True, lora=None, distillation=None)
        case LLMSRecConfig():
            return Variant("table", user_vector=system.user_vector, lora=None, distillation=system)
    raise AssertionError(f"{type(system).__name__} has no row")
