"""The frozen LLM: load it, freeze it, read hidden states at slots.

Letters: R rows, T tokens of a row, V vectors put in, P read-outs, D width of the LLM.
"""

from __future__ import annotations

import hashlib
import json
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from trainer.config import LLMConfig
from trainer.config.needs import LLM_CURE, may_be_hub_id

_EDGE_BYTES = 1 << 20
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


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
    _quiet()
    try:
        decoder, report = AutoModel.from_pretrained(
            config.path,
            config=settings,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
            local_files_only=not _may_ask_hub(config.path),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LLMError(f"cannot load the weights of {config.path}: {_first_line(error)}; {LLM_CURE}") from error
    # transformers would fill these with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise LLMError(f"the weights of {config.path} lack {missing[0]} ({len(missing)} missing): copy them again")
    return FrozenLLM(decoder)


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in the same folder.

    Raises:
        LLMError: there is none.
    """
    _quiet()
    folder = Path(config.path)
    # transformers makes an empty tokenizer of some folders without any.
    if folder.is_dir() and not any(found for pattern in _TOKENIZER_FILES for found in folder.glob(pattern)):
        raise LLMError(f"{folder} has no tokenizer (no tokenizer.json or tokenizer.model); {LLM_CURE}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config.path, local_files_only=not _may_ask_hub(config.path)
        )
    except (OSError, ValueError, KeyError) as error:
        raise LLMError(f"{config.path} has no tokenizer that loads ({_first_line(error)}); {LLM_CURE}") from error
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
    reachable = _may_ask_hub(path)
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=not reachable)
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error)
        if not Path(path).is_dir():
            hub = f"says: {reason}" if reachable else "cannot be reached (or HF_HUB_OFFLINE is set)"
            reason = "there is no such folder" + (f", and the Hugging Face hub {hub}" if may_be_hub_id(path) else "")
        raise LLMError(f"system.llm.path={path} is no language model: {reason}; {LLM_CURE}") from error
    kind = settings.model_type
    # Encoders such as BERT are in the list of causal LMs too, for they can be run as decoders.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(settings, "is_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or getattr(settings, "is_encoder_decoder", False):
        raise LLMError(f"{path} holds a '{kind}', not a causal LM; {LLM_CURE}")
    architectures = settings.architectures or []
    if architectures and not any("CausalLM" in name or name.endswith("Model") for name in architectures):
        raise LLMError(f"{path} holds {architectures[0]}, not a causal LM; {LLM_CURE}")
    return settings


@cache
def _may_ask_hub(path: str) -> bool:
    """False for a folder, and where the hub does not answer: its client would try again for a minute."""
    if not may_be_hub_id(path) or constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # only the proxy can tell
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)), timeout=5
        ).close()
    except OSError:
        return False
    return True


def _quiet() -> None:
    """No warnings about weights of layers that are not run and about titles longer than the model's context."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
