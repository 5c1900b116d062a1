"""The frozen LLM: load it, freeze it, read hidden states at slots.

Letters: R rows, T tokens of a row, V vectors put in, P read-outs, D width of the LLM.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from trainer.config import LLMConfig

_EDGE_BYTES = 1 << 20


class LLMError(ValueError):
    """The language model cannot be used; the message says why and what to do."""


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


def load_llm(config: LLMConfig) -> FrozenLLM:
    """The decoder of a causal LM, in `config.dtype`, cut to `config.layers` layers.

    Raises:
        LLMError: no such folder, no causal LM, more layers asked for than there are.
    """
    settings = _causal_lm_config(config.path)
    if config.layers is not None:
        if config.layers > settings.num_hidden_layers:
            raise LLMError(
                f"system.llm.layers={config.layers}, but {config.path} has {settings.num_hidden_layers} layers"
            )
        settings.num_hidden_layers = config.layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: config.layers]
    dtype = getattr(torch, config.dtype)
    transformers_logging.set_verbosity_error()  # the weights of layers that are not run count as unexpected
    transformers_logging.disable_progress_bar()
    try:
        decoder = AutoModel.from_pretrained(config.path, config=settings, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError) as error:
        raise LLMError(f"cannot load the weights of {config.path}: {_first_line(error)}") from error
    return FrozenLLM(decoder)


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in the same folder.

    Raises:
        LLMError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.path)
    except (OSError, ValueError, KeyError) as error:
        raise LLMError(f"{config.path} has no tokenizer that loads: {_first_line(error)}") from error
    return tokenizer


def llm_fingerprint(config: LLMConfig) -> str:
    """Twelve hex digits that change with the weights, the tokenizer or the number of layers run.

    Reads the small files whole and the edges of the large ones: a hash of 16 GB would cost a minute a start.
    """
    folder = Path(config.path)
    digest = hashlib.sha256(json.dumps([config.layers, config.dtype]).encode())
    if not folder.is_dir():
        digest.update(config.path.encode())
        return digest.hexdigest()[:12]
    names = [p for p in sorted(folder.iterdir()) if p.suffix in {".json", ".safetensors", ".model", ".txt"}]
    for path in names:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(size - _EDGE_BYTES, 0))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:12]


def _causal_lm_config(path: str) -> PretrainedConfig:
    cure = "set system.llm.path to a folder with config.json, safetensors weights and a tokenizer"
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise LLMError(f"{path} is no language model: {_first_line(error)}; {cure}") from error
    if settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(settings, "is_encoder_decoder", False):
        raise LLMError(f"{path} holds a '{settings.model_type}', not a causal LM; {cure}")
    architectures = settings.architectures or []
    if architectures and not any("CausalLM" in name or name.endswith("Model") for name in architectures):
        raise LLMError(f"{path} holds {architectures[0]}, not a causal LM; {cure}")
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
