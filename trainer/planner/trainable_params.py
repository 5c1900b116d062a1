"""How many parameters each recommender around an LLM trains (see `trainer/nn/projectors.py`)."""

from __future__ import annotations

from trainer.config import LLM4RecConfig, Task
from trainer.models.llm.variants import row_of
from trainer.planner.llm_shape import Adapters, LLMShape


def adapters_of(system: LLM4RecConfig) -> Adapters | None:
    """The adapters of a system that has them."""
    lora = row_of(system).lora
    return Adapters(lora.rank, lora.targets, lora.dropout > 0) if lora else None


def trained_parameters(
    system: LLM4RecConfig, shape: LLMShape, *, teacher_dim: int, item_dim: int, task: Task = "retrieval"
) -> int:
    """What a system trains: what its row of the table adds, for retrieval also two heads and two tokens.

    Args:
        item_dim: width of what f_I projects: the teacher's item table, or A-LLMRec's stage-1 encoding of it.
    """
    row, adapters = row_of(system), adapters_of(system)
    count = 0
    if task == "retrieval":
        count += 2 * _two_layers(shape.width, system.hidden_dim, system.projected_dim) + 2 * shape.width
    if row.shared_projector:
        count += (item_dim + 1) * 10 * item_dim + (10 * item_dim + 1) * shape.width
    elif row.item_slots:
        count += _two_layers(item_dim, shape.width, shape.width)
    if row.user_vector and not row.shared_projector:
        count += _two_layers(teacher_dim, shape.width, shape.width)
    if row.distillation:
        count += _two_layers(teacher_dim, system.projected_dim, system.projected_dim)
    return count + (adapters.parameters(shape) if adapters else 0)


def _two_layers(inner: int, hidden: int, outer: int) -> int:
    """Two linear layers with a layer norm between them."""
    return (inner + 1) * hidden + 2 * hidden + (hidden + 1) * outer
