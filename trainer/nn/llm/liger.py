"""Fused kernels of Liger (Hsu et al. 2024, arXiv 2410.10989): norms, gated products and rotary positions of the frozen
LLM, each one Triton kernel instead of several.

The linear layers and attention stay as they are, and so do adapters and int8 weights. Frozen norms get no weight
gradient. Results differ from those without by rounding.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from trainer.device import accelerator
from trainer.nn.pretrained import LLMError, first_line

_CURE = "or set system.llm.kernels=none"


def check_liger(settings: PretrainedConfig) -> None:
    """Whether Liger has kernels for this device and this model.

    Raises:
        LLMError: it has not, or cannot be imported; the message has the cure.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton without a GPU, for tests
    if accelerator() != "cuda" and not interpreted:
        raise LLMError(f"system.llm.kernels=liger runs on CUDA alone, and this is {accelerator()}: use CUDA, {_CURE}")
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
    """Run the parts of `decoder` that Liger knows with its kernels.

    Rotary positions are a function of transformers' module, so that all models of this family in the process get them.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Liger's product has one non-linearity for each kind, whatever the model's is.
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
    # The backward pass of its norms writes into the gradient of their output, which here is the caller's.
    last: Any = decoder.norm
    last.in_place = False
