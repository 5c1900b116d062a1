"""Fused Triton kernels of Liger (Hsu et al. 2024, arXiv 2410.10989) for norms, gated products and rotary positions of
the frozen LLM, each one kernel instead of several.

Linear layers, attention and adapters are unchanged. Frozen norms get no weight gradient. Results differ from those
without Liger by rounding.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from trainer.device import accelerator
from trainer.nn.pretrained import LLMError, first_line

_CURE = "or set system.llm.kernels=none"


def check_liger(settings: PretrainedConfig) -> None:
    """Check that Liger has kernels for this device and this model.

    Raises:
        LLMError: it does not have them, or cannot be imported; the message names the cure.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton without a GPU, for tests
    if accelerator() != "cuda" and not interpreted:
        raise LLMError(f"system.llm.kernels=liger runs on CUDA only, and this is {accelerator()}: use CUDA, {_CURE}")
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise LLMError(
            f"system.llm.kernels=liger cannot import liger-kernel ({first_line(error)}): "
            f"`pip install 'liger-kernel>=0.8.5'`, {_CURE}"
        ) from error
    if settings.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise LLMError(f"liger-kernel has no kernels for a '{settings.model_type}': set system.llm.kernels=none")


def use_liger(decoder: PreTrainedModel) -> None:
    """Run the parts of `decoder` that Liger supports in its kernels.

    Rotary positions are a function of transformers' module, so patching it affects all models of this family in the
    process.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Each of Liger's gated products has a fixed activation: use it only where the model has the same one.
    activation = getattr(decoder.config, "hidden_activation", None) or decoder.config.hidden_act
    _apply_liger_kernel_to_instance(
        model=decoder,
        rope=True,
        rms_norm=True,
        swiglu=activation in {"silu", "swish"},
        geglu=activation == "gelu_pytorch_tanh",
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    # The backward pass of Liger's norms overwrites the gradient of their output; the last norm's belongs to the caller.
    last: Any = decoder.norm
    last.in_place = False
