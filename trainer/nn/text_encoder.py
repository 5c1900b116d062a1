"""Text encoders: load any one of Hugging Face, read hidden states of padded texts.

Letters: B texts, T tokens of a text, D width of the encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from trainer.config import EncoderConfig
from trainer.data.collators.base import BatchRows
from trainer.data.encoder_texts import PaddedTexts
from trainer.nn.dropout import RowDropout
from trainer.nn.pretrained import LLMError, fingerprint, read_model, read_settings, read_tokenizer
from trainer.runs.requirements import ENCODER_CURE

# Their position ids start behind that of padding, so that they have fewer usable ones than rows.
_SHIFTED_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "longformer", "camembert", "mpnet", "data2vec-text"}
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


class TextEncoder(nn.Module):
    """An encoder without any head. Its dropout follows the global batch (see `RowDropout`).

    Args:
        encoder: loaded by `load_encoder`.
        dropout: of embeddings and hidden states, wherever the encoder has some.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim = int(encoder.config.hidden_size)
        self._dropouts = _follow_the_batch(encoder, dropout)

    def forward(self, real_BT: Tensor, rows: BatchRows, **inputs: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the last layer.

        Args:
            real_BT: True where there is a token; padding is on the right.
            inputs: `input_ids` (B, T), or `inputs_embeds` (B, T, D), to which the encoder adds its position vectors.
        """
        empty = not len(real_BT)
        if empty:  # a rank without a user still takes part, and not every encoder can read nothing
            real_BT, rows = real_BT.new_ones((1, *real_BT.shape[1:])), BatchRows(0, 1, 1)
            # Padded, not replaced: what made the inputs must find itself in the graph, on this rank as on the others.
            inputs = {name: F.pad(value, (0, 0) * (value.ndim - 1) + (0, 1)) for name, value in inputs.items()}
        for dropout in self._dropouts:
            dropout.rows = rows
        if self.encoder.config.model_type == "longformer":
            first_BT = torch.zeros_like(real_BT, dtype=torch.long)
            first_BT[:, 0] = 1
            inputs["global_attention_mask"] = first_BT
        hidden_BTD: Tensor = self.encoder(attention_mask=real_BT.long(), **inputs).last_hidden_state
        return hidden_BTD[:0] if empty else hidden_BTD

    def words(self) -> nn.Embedding:
        """The word embeddings."""
        embedding = self.encoder.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding


class TextVectors(nn.Module):
    """One vector a text: the mean over its tokens, or that of the first token."""

    def __init__(self, encoder: TextEncoder, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling

    def forward(self, texts: PaddedTexts) -> Tensor:
        """(B, D) in fp32."""
        return pooled(
            self.encoder(texts.real_BT, texts.rows, input_ids=texts.token_BT).float(), texts.real_BT, self.pooling
        )


def pooled(hidden_BTD: Tensor, real_BT: Tensor, pooling: str) -> Tensor:
    """(B, D) vectors of texts: the hidden state of the first token ("cls"), or the mean over the real ones."""
    if pooling == "cls":
        return hidden_BTD[:, 0]
    real_BT1 = real_BT[:, :, None]
    return (hidden_BTD * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)


class _BatchDropout(nn.Module):
    """Stands in for an encoder's `nn.Dropout`, which cannot be told which rows of the global batch it sees."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = RowDropout(p)
        self.rows = BatchRows(0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(x, self.rows)
        return dropped


def check_encoder(config: EncoderConfig, needed_tokens: int, key: str) -> None:
    """Whether `config.path` holds an encoder that can read so many tokens, before its weights are loaded.

    Args:
        key: what asks for that many tokens, for example `system.max_tokens`.

    Raises:
        LLMError: it does not; the message has the cure.
    """
    positions = _positions(_settings(config))
    if positions is not None and needed_tokens > positions:
        raise LLMError(f"{key}={needed_tokens}, but {config.path} reads at most {positions} tokens: lower it")


def encoder_width(config: EncoderConfig) -> int:
    """Dimensions of the encoder's vectors."""
    return int(_settings(config).hidden_size)


def load_encoder(config: EncoderConfig, *, dropout: float = 0.0, attention_window: int | None = None) -> TextEncoder:
    """The encoder in fp32, cut to `config.layers` layers.

    Args:
        attention_window: of a Longformer, in tokens; None keeps its own.

    Raises:
        LLMError: no such folder, no encoder, more layers asked for than there are, weights missing or damaged.
    """
    settings = _settings(config)
    if attention_window and settings.model_type == "longformer":
        settings.attention_window = [attention_window] * settings.num_hidden_layers
    for name in _ATTENTION_DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, 0.0)
    encoder: Any = read_model(config.path, settings, dtype="float32", cure=ENCODER_CURE, unread="pooler.")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # a head of next-sentence prediction, which nothing here reads
    return TextEncoder(encoder, dropout)


def load_encoder_tokenizer(config: EncoderConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in the same folder.

    Raises:
        LLMError: there is none.
    """
    return read_tokenizer(config.path, cure=ENCODER_CURE)


def encoder_fingerprint(config: EncoderConfig) -> str:
    """Twelve hex digits that change with the weights, the tokenizer or the number of layers run."""
    return fingerprint(config.path, config.layers)


def _settings(config: EncoderConfig) -> PretrainedConfig:
    what = f"system.encoder.path={config.path} is no text encoder"
    settings = read_settings(config.path, what=what, cure=ENCODER_CURE)
    if settings.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(settings, "is_decoder", False):
        raise LLMError(f"{what}: it holds a model of type {settings.model_type!r}; {ENCODER_CURE}")
    if config.layers is None:
        return settings
    if config.layers > settings.num_hidden_layers:
        raise LLMError(
            f"system.encoder.layers={config.layers}, but {config.path} has {settings.num_hidden_layers} layers: "
            "lower it, or leave it out to run all"
        )
    settings.num_hidden_layers = config.layers
    for name in ("layer_types", "attention_window"):
        if isinstance(getattr(settings, name, None), list):
            setattr(settings, name, getattr(settings, name)[: config.layers])
    return settings


def _positions(settings: PretrainedConfig) -> int | None:
    """How many tokens have a position vector; None: no limit."""
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return None
    shift = settings.pad_token_id + 1 if settings.model_type in _SHIFTED_POSITIONS else 0
    return int(positions) - shift


def _follow_the_batch(encoder: nn.Module, p: float) -> list[_BatchDropout]:
    """Replace the encoder's dropouts; those of attention were loaded with p = 0 and stay."""
    found = []
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0.0:
                dropout = _BatchDropout(p)
                setattr(module, name, dropout)
                found.append(dropout)
    return found
