"""`export.py --onnx`: onnxruntime computes the run's user vectors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sasrec_config

import trainer
from trainer.config import parse_config
from trainer.data.collators.base import BatchRows, ItemSequences
from trainer.data.reading.histories import Histories

runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
pytestmark = pytest.mark.process


def padded(histories: list[list[int]], length: int) -> np.ndarray:
    rows = [[0] * (length - len(items[-length:])) + items[-length:] for items in histories]
    return np.array(rows, np.int64)


def test_user_vectors_are_those_of_torch(teacher: Path, tmp_path: Path) -> None:
    run = trainer.load_run(teacher)
    run.export(tmp_path / "export", onnx=True)
    histories = [[1], [3, 9, 4], [5, 5, 7, 2] * 4, list(range(1, 13))]
    session = runtime.InferenceSession(str(tmp_path / "export/user_encoder.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"items": padded(histories, 12)})
    wanted = run.user_vectors([[run.items.ids[item - 1] for item in items] for items in histories])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["gru4rec", "bert4rec", "nextitnet"])
def test_other_id_systems(name: str, tmp_path: Path, world: Path) -> None:
    """Untrained: what is compared is the computation."""
    from trainer.data.reading.dataset import open_dataset
    from trainer.models import build_system
    from trainer.workflows.exporting.onnx_encoder import write_user_encoder

    tree = sasrec_config(world, tmp_path / "run")
    tree["system"] = {"name": name, "max_length": 12}
    config, dataset = parse_config(tree, "test"), open_dataset(world, full_check=False)
    system = build_system(config, dataset)
    system.model.eval()
    run: Any = SimpleNamespace(system=system, dataset=dataset, config=config)
    write_user_encoder(run, tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    items, length = [[1], [3, 9, 4], [5, 5, 7, 2] * 4, list(range(1, 12))], system.vectors.collator.max_history
    [found] = session.run(None, {"items": padded(items, length)})
    ends = np.cumsum([0, *map(len, items)])
    histories = Histories(np.arange(4), ends, np.concatenate(items), np.zeros(ends[-1], np.int64))
    with torch.no_grad():
        wanted = system.vectors.user_vectors(histories, torch.device("cpu")).vector_BD
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "system",
    [
        {"name": "sasrec", "dim": 8, "heads": 2, "norm": "pre", "mask_padding": True},
        {"name": "sasrec", "dim": 8, "norm": "original", "mask_padding": False},
        {"name": "sasrec", "dim": 8, "norm": "post", "mask_padding": True},
    ],
    ids=lambda system: f"{system['norm']}, {system['mask_padding']}",
)
def test_the_plain_sasrec_is_the_trained_one(system: dict[str, Any], tmp_path: Path, world: Path) -> None:
    from trainer.data.reading.dataset import open_dataset
    from trainer.models import build_system
    from trainer.workflows.exporting.onnx_encoder import _PlainSASRec

    tree = sasrec_config(world, tmp_path / "run")
    tree["system"] = {"max_length": 12, **system}
    model: Any = build_system(parse_config(tree, "test"), open_dataset(world, full_check=False)).model
    item_BL = torch.from_numpy(padded([[1], [3, 9, 4], [5, 5, 7, 2] * 4, list(range(1, 13))], 12))
    with torch.no_grad():
        wanted = model.eval().user_vectors(ItemSequences(item_BL, BatchRows(0, 4, 4)))
        torch.testing.assert_close(_PlainSASRec(model)(item_BL), wanted, atol=1e-5, rtol=1e-4)
