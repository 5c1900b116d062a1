"""Decoder families, each with its kind of tokenizer, through the real builder, collator and one training step."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from helpers import build_llm, llm_srec_config
from llm_parts import retrieval_parts
from tokenizer_helpers import sentencepiece_folder, train_sentencepiece

from trainer.config import RunConfig
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import build_system
from trainer.models.llm.retrieval import LLM4Rec

# Model family and class of its SentencePiece tokenizer (None: byte-level BPE).
FAMILIES = [("llama", None), ("llama", "LlamaTokenizer"), ("mistral", "LlamaTokenizer"), ("gemma", "GemmaTokenizer")]
FAMILIES += [("qwen2", None), ("qwen3", None)]
every_family = pytest.mark.parametrize(("family", "tokenizer"), FAMILIES)


@pytest.fixture(scope="module")
def dataset(world: Path) -> Dataset:
    return open_dataset(world, full_check=False)


def build(
    folder: Path, dataset: Dataset, teacher: Path, family: str, tokenizer: str | None
) -> tuple[LLM4Rec, RetrievalCollator]:
    llm = build_llm(folder / "llm", family=family)
    if tokenizer:
        for file in llm.glob("tokenizer*"):
            file.unlink()
        titles = pl.read_parquet(dataset.path / "catalog.parquet")["title"].to_list()
        model = train_sentencepiece(folder / "trained.model", titles, vocabulary=380)
        sentencepiece_folder(llm, model, tokenizer_class=tokenizer)
    config = RunConfig.model_validate(llm_srec_config(dataset.path, folder / "run", teacher, llm))
    return retrieval_parts(build_system(config, dataset))


@every_family
def test_a_family_loads_and_trains_without_special_cases(
    tmp_path: Path, dataset: Dataset, teacher: Path, family: str, tokenizer: str | None
) -> None:
    model, collator = build(tmp_path, dataset, teacher, family, tokenizer)
    users = next(read_in_order(dataset.path, dataset.manifest)).take(slice(0, 8))
    batch = collator.train(users, slice(0, 8), epoch=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.loss(model(batch)).total
        loss.backward()
        values.append(float(loss.detach()))
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
    assert values[-1] < values[0]
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    with torch.no_grad():
        model.eval()
        user_BD = model.user_vectors(collator.histories(users.train))
        # A batch of one user gives the same vector as a batch of eight.
        first_D = model.user_vectors(collator.histories(users.take(slice(0, 1)).train))[0]
    torch.testing.assert_close(user_BD[0], first_D, rtol=1e-4, atol=1e-5)
    assert user_BD.std(0).max() > 1e-5, "different users have different vectors"


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "bart"])
def test_unsupported_families_are_refused(tmp_path: Path, dataset: Dataset, teacher: Path, family: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family
    run = RunConfig.model_validate(llm_srec_config(dataset.path, tmp_path / "run", teacher, tmp_path))
    with pytest.raises(ValueError, match=rf"holds a '{family}', not a causal LM; set system\.llm\.path to a folder"):
        build_system(run, dataset)
