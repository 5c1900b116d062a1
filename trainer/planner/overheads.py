"""Work of a step besides its matrix products: elementwise passes that are not fused, and launches by the host.

Elementwise work that every run has (norms, gated products, rotary positions, residuals) is part of the achieved
fraction of the peak (`devices.py`). Counted here is what only some settings add.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planner.costs import Load, elements
from trainer.planner.llm_shape import Adapters, LLMShape

_FUSED_DROPOUT, _UNFUSED_DROPOUT = 8, 134
"""Bytes per element of one pass, forward or backward, of the dropout of adapters: the Triton kernel
(`trainer/nn/dropout_kernel.py`) reads and writes fp32 once; torch's passes also hash in int32."""
_SCORE, _DISTILLED_SCORE = (18, 7), (30, 15)
"""Bytes per score of the batch's items that are held at once, and until the backward pass: fp32 scores, corrected,
masked and normalised, and masks; with the teacher's scores both distributions and their product."""
_PAIRS = 5 * 4
"""Bytes per element of the differences of pairs in the uniformity losses of both sides: five fp32 tensors at once."""
_FP8_INPUT = 2 + (2 + 2) + (2 + 1)
"""Bytes per element of an fp8 layer's input: its largest value is found, it is scaled in bf16, and it is rounded."""


LAUNCH_SECONDS = (18e-6, 27e-6)
"""Shortest and longest time that the host is taken to spend per kernel in eager mode: Python of the layers, torch's
dispatch, autograd and the driver. An estimate, not measured; CPUs differ by more than this."""
_FROZEN_LAUNCHES, _TRAINED_LAUNCHES, _BACKWARD_LAUNCHES = (11, 26), (16, 28), (213, 47)
"""Kernels of the frozen stream's forward pass, of the trained stream's and of the backward pass: once, and per layer.
These and the following were counted in steps of LLM-SRec, TALLRec and LLaRA on CUDA tensors without data, with the
variable-length attention kernel."""
_STEP_LAUNCHES = 334
"""Kernels of a step besides: the teacher, the loss, norms of gradients, and the optimizer."""
_QUANTIZED_LAUNCHES = {"none": (0, 0), "int8": (2, 2), "fp8": (8, 2)}
"""Further kernels per linear layer, forward and backward."""
_ADAPTER_LAUNCHES, _ADAPTER_STEP_LAUNCHES, _DROPOUT_LAUNCHES = (6, 15), 5, {True: 1, False: 30}
"""Kernels per adapter, forward and backward; in the rest of a step; and per pass of its dropout, fused or not."""


@dataclass(frozen=True)
class Running:
    """How an LLM is run.

    Args:
        element: bytes per activation.
        quantization: none, int8 or fp8.
        adapters: their dropout is counted if it is on.
        fused_dropout: by one kernel per pass.
    """

    shape: LLMShape
    element: int
    quantization: str = "none"
    adapters: Adapters | None = None
    fused_dropout: bool = True

    def forward_bytes(self, load: Load) -> float:
        """Bytes moved by a forward pass over a batch, besides what every run moves."""
        moved = self.dropout_bytes(load)
        if self.quantization == "fp8":
            moved += _FP8_INPUT * elements(self.shape, self._inputs(), load.run, load.readouts)
        if self.quantization == "int8":
            passes = 2 if load.frozen else 1
            outputs = elements(self.shape, self._outputs(), load.run, load.readouts)
            moved += passes * self._unpacking() + 2 * self.element * outputs
        return moved

    def backward_bytes(self, load: Load) -> float:
        """Bytes moved by the backward pass, likewise: gradients are scaled, and 8-bit weights unpacked."""
        moved = self.dropout_bytes(load)
        if self.quantization != "none":
            outputs = elements(self.shape, self._outputs(), load.trained, load.readouts)
            moved += self._unpacking() + 2 * self.element * outputs
        return moved

    def forward_launches(self, load: Load) -> int:
        """Kernels of a forward pass."""
        streams = [_FROZEN_LAUNCHES, _TRAINED_LAUNCHES] if load.frozen else [_TRAINED_LAUNCHES]
        return sum(self._launches(once, layer, direction=0) for once, layer in streams)

    def backward_launches(self) -> int:
        """Kernels of a backward pass."""
        return self._launches(*_BACKWARD_LAUNCHES, direction=1)

    def step_launches(self) -> int:
        """Kernels of a step outside the passes through the LLM and their backward passes."""
        adapted = len(self.adapters.targets) * self.shape.layers if self.adapters else 0
        return _STEP_LAUNCHES + adapted * _ADAPTER_STEP_LAUNCHES

    def _launches(self, once: int, layer: int, direction: int) -> int:
        per_layer = layer + len(self.shape.linear) * _QUANTIZED_LAUNCHES[self.quantization][direction]
        if self.adapters:
            dropout = self.adapters.dropout and _DROPOUT_LAUNCHES[self.fused_dropout]
            per_layer += len(self.adapters.targets) * (_ADAPTER_LAUNCHES[direction] + dropout)
        return once + per_layer * self.shape.layers

    def dropout_bytes(self, load: Load) -> float:
        """Bytes moved by the dropout of adapters in one pass, forward or backward."""
        if self.adapters is None or not self.adapters.dropout:
            return 0.0
        inputs = {name: size for name, size in self._inputs().items() if name in self.adapters.targets}
        per_element = _FUSED_DROPOUT if self.fused_dropout else _UNFUSED_DROPOUT
        return per_element * elements(self.shape, inputs, load.trained, load.readouts)

    def _unpacking(self) -> float:
        """Bytes of converting all 8-bit weights to the dtype of the activations, once."""
        return (1 + self.element) * self.shape.matmul_parameters

    def _inputs(self) -> dict[str, int]:
        return {name: columns for name, (_, columns) in self.shape.linear.items()}

    def _outputs(self) -> dict[str, int]:
        return {name: rows for name, (rows, _) in self.shape.linear.items()}


def loss_bytes(terms: int, *, scores: int, pair_elements: int = 0, scored_twice: bool = False) -> int:
    """Peak memory of the loss of a global batch and its gradient, on each rank.

    Args:
        terms: bytes of the terms of all users.
        scores: targets times the items that all of them are scored against.
        pair_elements: pairs of targets times the width of their vectors, for the uniformity loss.
        scored_twice: the teacher scores the items, too (`system.score_distill_weight`).
    """
    most, kept = _DISTILLED_SCORE if scored_twice else _SCORE
    return terms + max(most * scores, kept * scores + _PAIRS * pair_elements)
