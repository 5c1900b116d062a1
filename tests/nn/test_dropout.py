"""Dropout whose masks depend on the content of a prompt, not on how it is packed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.prompts.packing import pack
from trainer.data.prompts.prompt import READOUT_SLOT, Branch, Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.nn.dropout import TokenDropout, TokenHashes

NOTHING = np.zeros(0, np.int64)


def _prompt(*tokens: int, slots: dict[int, int] | None = None, branches: tuple[Branch, ...] = ()) -> Prompt:
    slots = slots or {}
    columns = (list(tokens), list(slots), list(slots.values()), [len(tokens) - 1])
    token_T, slot_S, item_S, readout_R = (np.array(column, np.int64) for column in columns)
    return Prompt(token_T, slot_S, item_S, readout_R, branches)


def _words(prompts: list[Prompt], *, seed: int = 1, rows: int | None = None) -> list[int]:
    """The word of each prompt's last token."""
    address = TokenHashes()
    packed = pack(prompts, frozen_prefix=False) if rows is None else pack_rows(prompts, rows)
    address.set(seed, packed)
    words = address.words(len(packed.trained.token_T))[packed.readout_R]
    assert torch.equal(words, address.words(len(packed.readout_R)))
    found: list[int] = words.tolist()
    return found


def test_a_token_is_identified_by_its_prompt_up_to_it() -> None:
    long = [*range(2, 32)]
    one, other = _prompt(*long, 40, 41), _prompt(*long, 50, 41)
    assert _words([one, other]) == _words([one]) + _words([other]), "a shared prefix changes nothing"
    assert _words([other, one, other]) == _words([other, one, other], rows=64)
    base = _words([one])
    for changed in (
        _prompt(*long, 41, 40), _prompt(*long, 40, 42), _prompt(1, *long, 40, 41), _prompt(*long, 40, 41, slots={3: 7}),
    ):  # fmt: skip
        assert _words([changed]) != base
    assert _words([_prompt(*long, slots={3: 7})]) != _words([_prompt(*long, slots={3: 8})])
    assert _words([_prompt(*long, slots={3: READOUT_SLOT})]) != _words([_prompt(*long)])
    assert _words([one], seed=2) != base


def test_a_branch_continues_its_trunk() -> None:
    def branch(*tokens: int) -> Branch:
        return Branch(20, np.array(tokens), NOTHING, NOTHING, np.array([len(tokens) - 1]))

    trunk = [*range(2, 26)]
    tree = _prompt(*trunk, branches=(branch(60, 61), branch(70)))
    alone = [_prompt(*trunk), _prompt(*trunk[:20], 60, 61), _prompt(*trunk[:20], 70)]
    assert _words([tree]) == _words(alone) == _words([tree], rows=64)


def _kept(
    seed: int = 1, layer: int = 0, token: int = 5, width: int = 256, tokens: int = 64, p: float = 0.3
) -> torch.Tensor:
    address = TokenHashes()
    address.set(seed, pack([_prompt(*([token] * tokens))], frozen_prefix=False))
    out: torch.Tensor = TokenDropout(p, layer, address).train()(torch.ones(1, tokens, width))
    assert set(out.flatten().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    return out[0] > 0


def test_the_share_dropped_is_p() -> None:
    for p in (0.05, 0.1, 0.5):
        kept = _kept(tokens=400, width=500, p=p).float()
        assert abs(float(1 - kept.mean()) - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        for share in (kept.mean(0), kept.mean(1)):  # per feature, per token
            assert (share - (1 - p)).abs().max() < 6 * (p * (1 - p) / 400) ** 0.5


def test_masks_of_different_addresses_are_independent() -> None:
    base = _kept().float() - 0.7
    others = [_kept(seed=2), _kept(token=6), _kept(layer=1), _kept().roll(1, 0), _kept().roll(1, 1)]
    others += [_kept(token=2**k) for k in range(3, 12)] + [_kept(layer=2**k) for k in range(2, 8)]
    for other in others:
        correlation = float((base * (other.float() - 0.7)).mean()) / 0.21
        assert abs(correlation) < 5 / base.numel() ** 0.5


def test_evaluation_changes_nothing() -> None:
    x = torch.randn(1, 3, 5)
    assert torch.equal(TokenDropout(0.5, 0, TokenHashes()).eval()(x), x)
    assert torch.equal(TokenDropout(0.0, 0, TokenHashes()).train()(x), x)


def _lowbias32(word: Any) -> Any:
    """Wellons 2018, as published: on unsigned words."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B)
    return word ^ (word >> np.uint32(16))


@pytest.mark.parametrize("width", [7, 1500])
def test_masks_are_the_published_hash_and_the_gradient_has_the_same(width: int) -> None:
    """Bit for bit, also where chunks of rows end: runs must resume with the masks that they started with."""
    tokens, p = 200, 0.3
    address = TokenHashes()
    address.set(3, pack([_prompt(*range(2, 2 + tokens))], frozen_prefix=False))
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    x[0, 5, 2:5] = torch.tensor([torch.inf, torch.nan, -0.0])
    out = TokenDropout(p, 9, address).train()(x.requires_grad_())
    (gradient,) = torch.autograd.grad(out, x, grad)

    feature_D = _lowbias32(np.arange(width, dtype=np.uint32) + np.uint32(9 * 0x10001))
    word_TD = _lowbias32(address.words(tokens).numpy().view(np.uint32)[:, None] ^ feature_D)
    kept_TD = torch.from_numpy((word_TD.view(np.int32) >= int(p * 2**32) - 2**31).astype(np.float32))
    for found, given in ((out, x), (gradient, grad)):
        expected_TD = given[0] * kept_TD / torch.tensor(1 - p)
        assert torch.equal(found[0].view(torch.int32), expected_TD.view(torch.int32))


def test_no_mask_is_kept_for_the_backward_pass() -> None:
    address = TokenHashes()
    address.set(3, pack([_prompt(*range(2, 66))], frozen_prefix=False))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.nbytes), lambda none: none):
        TokenDropout(0.3, 0, address).train()(torch.ones(1, 64, 256, requires_grad=True))
    assert sum(kept) == 4 * 64


@pytest.mark.process
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("mode", ["interpret", "compile"])
def test_the_triton_kernel_has_the_same_bits(mode: str) -> None:
    """In Triton's interpreter; and compiled for GPUs that are not there, its roundings are those of torch."""
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])
    environment = os.environ | {"TRITON_INTERPRET": "1" if mode == "interpret" else "0", "PYTHONPATH": paths}
    command = [sys.executable, str(Path(__file__).with_name("dropout_interpreted.py")), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == (5 if mode == "interpret" else 3)
    assert all(line.split()[-1] == "0" for line in lines), lines
