"""The frozen LLM: load it, freeze it, read hidden states at slots.

Letters: R rows, T tokens of a row, V vectors put in, P read-outs, D width of the LLM.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainer.config import LLMConfig
from trainer.config.needs import LLM_CURE
from trainer.nn.pretrained import LLMError, fingerprint, first_line, may_ask_hub, quiet, read_settings, read_tokenizer


class FrozenLLM(nn.Module):
    """A decoder without its LM head. Its weights never change, gradients flow through it to what is put in."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(False)
        self.decoder.train(False)
        self.dim = int(decoder.config.hidden_size)

    def token_table(self) -> Tensor:
        """(vocabulary, D) input embeddings."""
        return self._embedding().weight

    def forward(
        self,
        token_RT: Tensor,
        position_RT: Tensor,
        slot: tuple[Tensor, Tensor],
        vector_VD: Tensor,
        readout: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Hidden states (P, D) in fp32 after the final norm, at the (row, column) pairs of `readout`.

        Args:
            position_RT: restarts at 0 at each prompt; attention stays within a prompt.
            slot: (row, column) pairs, V of them, whose token embedding is replaced by `vector_VD`.
        """
        embedding = self._embedding()(token_RT)
        embedding = embedding.index_put(slot, vector_VD.to(embedding.dtype))
        # transformers tells packed prompts apart by the restarting positions when there is no attention mask.
        hidden_RTD = self.decoder(
            inputs_embeds=embedding, position_ids=position_RT, attention_mask=None, use_cache=False
        ).last_hidden_state
        read_PD: Tensor = hidden_RTD[readout].float()
        return read_PD

    def train(self, mode: bool = True) -> FrozenLLM:
        """Stays in evaluation mode: a frozen model has no dropout."""
        return super().train(False)

    def _embedding(self) -> nn.Embedding:
        embedding = self.decoder.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding


def check_llm(config: LLMConfig) -> None:
    """Whether `config.path` holds a causal LM with enough layers, before its weights are loaded.

    Raises:
        LLMError: it does not; the message has the cure.
    """
    _settings(config)


def load_llm(config: LLMConfig) -> FrozenLLM:
    """The decoder of a causal LM, in `config.dtype`, cut to `config.layers` layers.

    Raises:
        LLMError: no such folder, no causal LM, more layers asked for than there are, weights missing or damaged.
    """
    settings = _settings(config)
    quiet()
    try:
        decoder, report = AutoModel.from_pretrained(
            config.path,
            config=settings,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
            local_files_only=not may_ask_hub(config.path),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LLMError(f"cannot load the weights of {config.path}: {first_line(error)}; {LLM_CURE}") from error
    # transformers would fill these with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise LLMError(f"the weights of {config.path} lack {missing[0]} ({len(missing)} missing): copy them again")
    return FrozenLLM(decoder)


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in the same folder.

    Raises:
        LLMError: there is none.
    """
    return read_tokenizer(config.path, cure=LLM_CURE)


def llm_fingerprint(config: LLMConfig) -> str:
    """Twelve hex digits that change with the weights, the tokenizer or the number of layers run."""
    return fingerprint(config.path, config.layers, config.dtype)


def _settings(config: LLMConfig) -> PretrainedConfig:
    settings = _causal_lm_config(config.path)
    if config.layers is not None:
        if config.layers > settings.num_hidden_layers:
            raise LLMError(
                f"system.llm.layers={config.layers}, but {config.path} has {settings.num_hidden_layers} layers: "
                "lower it, or leave it out to run all"
            )
        settings.num_hidden_layers = config.layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: config.layers]
    return settings


def _causal_lm_config(path: str) -> PretrainedConfig:
    settings = read_settings(path, what=f"system.llm.path={path} is no language model", cure=LLM_CURE)
    kind = settings.model_type
    # Encoders such as BERT are in the list of causal LMs too, for they can be run as decoders.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(settings, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or getattr(settings, "is_encoder_decoder", False):
        raise LLMError(f"{path} holds a '{kind}', not a causal LM; {LLM_CURE}")
    architectures = settings.architectures or []
    if architectures and not any("CausalLM" in name or name.endswith("Model") for name in architectures):
        raise LLMError(f"{path} holds {architectures[0]}, not a causal LM; {LLM_CURE}")
    return settings
