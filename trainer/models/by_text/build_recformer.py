"""Builders of RECFORMER's pre-training and of both stages of its fine-tuning."""

from __future__ import annotations

from trainer.config import RunConfig
from trainer.config.text_systems import RecformerConfig, RecformerPretrainConfig
from trainer.data.collators.sentences import FinetuneBatches, PretrainBatches, SentenceCollator
from trainer.data.item_sentences import SentenceWriter, write_sentences
from trainer.data.reading.dataset import Dataset
from trainer.models.by_text.encoding import check_same_encoder, weights_below
from trainer.models.by_text.recformer import Recformer, RecformerPretrain, SentenceEncoder
from trainer.models.system import EpochItems, System, check_negatives
from trainer.nn.text_encoder import check_encoder, encoder_fingerprint, load_encoder, load_encoder_tokenizer
from trainer.runs.requirements import recformer_run

_LONGFORMER_WINDOW = 64  # tokens; RECFORMER's own


def build_recformer_pretrain(config: RunConfig, system: RecformerPretrainConfig, dataset: Dataset) -> System:
    """RECFORMER's encoder, before it knows the task."""
    writer = _sentence_writer(system, dataset)
    collator = SentenceCollator(writer, PretrainBatches(writer, system.mask_share, config.seed))
    model = RecformerPretrain(system, _sentence_encoder(system))
    return System(model, collator, encoder_fingerprint(system.encoder))


def build_recformer(config: RunConfig, system: RecformerConfig, dataset: Dataset) -> System:
    """One stage of RECFORMER's fine-tuning."""
    if system.negatives is not None:
        key = f"system.negatives={system.negatives}"
        check_negatives(dataset, key=key, needed=system.negatives, seen=None)
    writer = _sentence_writer(system, dataset)
    collator = SentenceCollator(writer, FinetuneBatches(writer, dataset.num_items, system.negatives, config.seed))
    model = Recformer(system, _sentence_encoder(system), dataset.num_items)
    fingerprint = encoder_fingerprint(system.encoder)
    built_on = {}
    for key, path in (("pretrained", system.pretrained), ("stage1", system.stage1)):
        if path is not None:
            checkpoint = recformer_run(system, key, path, dataset.path, dataset.manifest)
            check_same_encoder(key, path, checkpoint, fingerprint)
            model.sentence.load_state_dict(weights_below("sentence.", checkpoint), strict=False)
            built_on[key] = checkpoint.weights_sha256
            if key == "stage1":
                model.table.keep(weights_below("table.", checkpoint)["value"])
    epoch_items = EpochItems(model.encode_items, model.keep_items) if system.stage == 1 else None
    return System(model, collator, fingerprint, built_on, epoch_items=epoch_items)


def _sentence_writer(system: RecformerConfig | RecformerPretrainConfig, dataset: Dataset) -> SentenceWriter:
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    texts = dataset.texts(*system.attributes)
    return write_sentences(
        load_encoder_tokenizer(system.encoder),
        [dict(zip(system.attributes, values, strict=True)) for values in texts],
        max_attribute_tokens=system.max_attribute_tokens,
        max_items=system.max_items,
        max_tokens=system.max_tokens,
    )


def _sentence_encoder(system: RecformerConfig | RecformerPretrainConfig) -> SentenceEncoder:
    encoder = load_encoder(system.encoder, dropout=system.dropout, attention_window=_LONGFORMER_WINDOW)
    if system.freeze_words:
        encoder.words().requires_grad_(False)
    return SentenceEncoder(encoder, system.max_items, system.pooling)
