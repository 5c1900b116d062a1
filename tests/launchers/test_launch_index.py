"""`export.py --index`: plain faiss finds what the run recommends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from launch_helpers import Refused

import trainer
from launchers import export

faiss = pytest.importorskip("faiss", reason="the extra faiss is not installed")
pytestmark = pytest.mark.process


def test_an_exact_index_lists_what_is_recommended(teacher: Path, tmp_path: Path) -> None:
    export.main([str(teacher), str(tmp_path / "export"), "--index", "exact"])
    run = trainer.load_run(teacher)
    histories = [[item, other] for item, other in zip(run.items.ids[:20], run.items.ids[20:], strict=True)]
    score, row = faiss.read_index(str(tmp_path / "export/index.faiss")).search(run.user_vectors(histories), 5)
    ids = pl.read_parquet(tmp_path / "export/items.parquet")["item_id"].to_numpy()
    for wanted, found, scores in zip(run.recommend(histories, k=5, exclude_seen=False), row, score, strict=True):
        assert [item.item_id for item in wanted.recommendations] == ids[found].tolist()
        np.testing.assert_allclose([item.score for item in wanted.recommendations], scores, atol=1e-3)


def test_hnsw_finds_most_of_many_items(tmp_path: Path) -> None:
    """On vectors of very different lengths, as popular and rare items have them."""
    from trainer.workflows.exporting.index import write_index

    generator = np.random.default_rng(0)
    item_ND = (generator.normal(size=(3000, 32)) * generator.lognormal(size=(3000, 1))).astype(np.float32)
    user_BD = generator.normal(size=(100, 32)).astype(np.float32)
    write_index(item_ND, "hnsw", tmp_path / "index.faiss")
    _, found = faiss.read_index(str(tmp_path / "index.faiss")).search(user_BD, 10)
    best = np.argsort(-(user_BD @ item_ND.T), axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)])
    assert recall > 0.95


def test_without_faiss(teacher: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(export.main, teacher, tmp_path / "export", "--index", "exact")
    assert "--index needs faiss: pip install 'llm-srec-trainer[faiss]'" in line
