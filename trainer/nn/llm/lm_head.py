"""The LLM's own LM head, loaded only where tokens are predicted.

Letters: R read-outs, D width of the LLM, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from trainer.config import LLMConfig
from trainer.nn.llm.backbone import FrozenLLM
from trainer.nn.llm.packing_check import first_layers
from trainer.nn.pretrained import LLMError, first_line, hub_reachable, in_dtype, read_settings, silence_transformers
from trainer.runs.model_folder import LLM_CURE

_RESCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class LMHead(nn.Module):
    """Frozen linear map from hidden states to logits."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD.requires_grad_(False)

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """(R, V) logits in fp32."""
        return F.linear(hidden_RD.to(self.weight.dtype), self.weight).float()


def load_lm_head(config: LLMConfig, llm: FrozenLLM) -> LMHead:
    """Load the head of the causal LM whose decoder is `llm`: its token table where they are tied, else its own weights.

    Raises:
        LLMError: the head's weights are missing, or the model caps or rescales its logits, which `LMHead` does not.
    """
    settings = read_settings(config.path, what=f"system.llm.path={config.path} is not a language model", cure=LLM_CURE)
    if rescales := [name for name in _RESCALES if getattr(settings, name, None) not in (None, 1.0)]:
        raise LLMError(
            f"{config.path} caps or rescales its logits ({rescales[0]}), which generation does not support; {LLM_CURE}"
        )
    if settings.tie_word_embeddings:
        table = llm.token_table()
        assert isinstance(table, nn.Parameter)
        return LMHead(table)
    first_layers(settings, 0)  # loads no layer weights: the decoder is loaded already
    weight: nn.Parameter = load_causal_lm(config, settings).get_output_embeddings().weight
    return LMHead(weight)


def load_causal_lm(config: LLMConfig, settings: PretrainedConfig | None = None) -> Any:
    """Load a causal LM with its head, as transformers runs it.

    Args:
        settings: the model's configuration, changed; None: as it is in the folder.

    Raises:
        LLMError: weights are missing or damaged.
    """
    silence_transformers()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=settings,
            **in_dtype(config.dtype),
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=not hub_reachable(config.path),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise LLMError(f"the weights of {config.path} do not load ({first_line(error)}): copy them again") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise LLMError(f"the weights of {config.path} lack {missing[0]}: copy them again")
    return model
