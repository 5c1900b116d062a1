"""Text encoders: loading one of Hugging Face, and hidden states of padded texts.

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
from trainer.runs.model_folder import ENCODER_CURE

# Their position ids start after that of padding, so that not all rows of their position table are usable.
_SHIFTED_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "longformer", "camembert", "mpnet", "data2vec-text"}
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


class TextEncoder(nn.Module):
    """An encoder without any head. Its dropout follows the global batch (see `RowDropout`).

    Args:
        encoder: model loaded by `load_encoder`.
        dropout: probability for embeddings and hidden states, wherever the encoder has a dropout layer.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim = int(encoder.config.hidden_size)
        self._dropouts = _follow_the_batch(encoder, dropout)

    def forward(self, real_BT: Tensor, rows: BatchRows, **inputs: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the last layer.

        Args:
            real_BT: True at tokens, False at padding, which is on the right.
            rows: rows of the global batch that the texts are, for dropout.
            inputs: `input_ids` (B, T), or `inputs_embeds` (B, T, D), to which the encoder adds its position vectors.
        """
        empty = not len(real_BT)
        if empty:  # a rank without users still takes part in a step, and not every encoder accepts an empty batch
            real_BT, rows = real_BT.new_ones((1, *real_BT.shape[1:])), BatchRows(0, 1, 1)
            # Padded, not replaced: the modules that computed the inputs must be in the graph, as on the other ranks.
            inputs = {name: F.pad(value, (0, 0) * (value.ndim - 1) + (0, 1)) for name, value in inputs.items()}
        for dropout in self._dropouts:
            dropout.rows = rows
        if self.encoder.config.model_type == "longformer":
            # The first token attends globally.
            first_BT = torch.zeros_like(real_BT, dtype=torch.long)
            first_BT[:, 0] = 1
            inputs["global_attention_mask"] = first_BT
        hidden_BTD: Tensor = self.encoder(attention_mask=real_BT.long(), **inputs).last_hidden_state
        return hidden_BTD[:0] if empty else hidden_BTD

    def words(self) -> nn.Embedding:
        """The encoder's word embeddings."""
        embedding = self.encoder.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding


class TextVectors(nn.Module):
    """One vector per text: the mean over its tokens, or the first token's."""

    def __init__(self, encoder: TextEncoder, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling

    def forward(self, texts: PaddedTexts) -> Tensor:
        """(B, D) vectors in fp32."""
        return pooled(
            self.encoder(texts.real_BT, texts.rows, input_ids=texts.token_BT).float(), texts.real_BT, self.pooling
        )


def pooled(hidden_BTD: Tensor, real_BT: Tensor, pooling: str) -> Tensor:
    """(B, D) vectors of texts: the first token's hidden state ("cls"), or the mean over real tokens."""
    if pooling == "cls":
        return hidden_BTD[:, 0]
    real_BT1 = real_BT[:, :, None]
    return (hidden_BTD * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)


class _BatchDropout(nn.Module):
    """Replaces an encoder's `nn.Dropout`, which is not passed the rows: `TextEncoder` sets them before each forward."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = RowDropout(p)
        self.rows = BatchRows(0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(x, self.rows)
        return dropped


def check_encoder(config: EncoderConfig, needed_tokens: int, key: str) -> None:
    """Check that `config.path` holds an encoder that can read this many tokens, without loading its weights.

    Args:
        key: configuration key that sets `needed_tokens`, for example `system.max_tokens`.

    Raises:
        LLMError: it does not; the message names the cure.
    """
    positions = _positions(_settings(config))
    if positions is not None and needed_tokens > positions:
        raise LLMError(f"{key}={needed_tokens}, but {config.path} reads at most {positions} tokens: lower it")


def encoder_width(config: EncoderConfig) -> int:
    """Width of the encoder's vectors."""
    return int(_settings(config).hidden_size)


def load_encoder(config: EncoderConfig, *, dropout: float = 0.0, attention_window: int | None = None) -> TextEncoder:
    """Load the encoder in fp32, cut to its first `config.layers` layers.

    Args:
        dropout: probability for embeddings and hidden states.
        attention_window: attention window of a Longformer, in tokens; None keeps its own.

    Raises:
        LLMError: no such folder, not an encoder, fewer layers than `config.layers`, or weights missing or damaged.
    """
    settings = _settings(config)
    if attention_window and settings.model_type == "longformer":
        settings.attention_window = [attention_window] * settings.num_hidden_layers
    # Attention draws its dropout inside a kernel, where it cannot follow the global batch.
    for name in _ATTENTION_DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, 0.0)
    encoder: Any = read_model(config.path, settings, dtype="float32", cure=ENCODER_CURE, unread="pooler.")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the head of next-sentence prediction, unused here
    return TextEncoder(encoder, dropout)


def load_encoder_tokenizer(config: EncoderConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the encoder's folder.

    Raises:
        LLMError: the folder has none that loads.
    """
    return read_tokenizer(config.path, cure=ENCODER_CURE)


def encoder_fingerprint(config: EncoderConfig) -> str:
    """Twelve hex digits that change with the weights, the tokenizer or the number of layers run."""
    return fingerprint(config.path, config.layers)


def _settings(config: EncoderConfig) -> PretrainedConfig:
    what = f"system.encoder.path={config.path} is not a text encoder"
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
    """Number of tokens that have a position vector; None: no limit."""
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return None
    shift = settings.pad_token_id + 1 if settings.model_type in _SHIFTED_POSITIONS else 0
    return int(positions) - shift


def _follow_the_batch(encoder: nn.Module, p: float) -> list[_BatchDropout]:
    """Replace the encoder's dropout layers; those of attention were loaded with p = 0 and stay."""
    found = []
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0.0:
                dropout = _BatchDropout(p)
                setattr(module, name, dropout)
                found.append(dropout)
    return found
