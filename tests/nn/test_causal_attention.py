"""Causal attention by bucket and block against the equation written out, and the masks of its dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.nn.causal_attention import CausalAttention, Shapes, split
from trainer.nn.dropout import HashDropout, position_words

SHAPES: Shapes = ((2, 130), (1, 64), (3, 5), (1, 1))  # blocks of 64 queries: three, one exactly, parts of one
SLOTS = sum(rows * length for rows, length in SHAPES)


def _attention(heads: int, dropout: float) -> CausalAttention:
    torch.manual_seed(0)
    attention = CausalAttention(8, heads, 130, dropout, address=3).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


def _words() -> Tensor:
    torch.manual_seed(1)
    return position_words(torch.arange(SLOTS), torch.zeros(SLOTS))


def _written_out(attention: CausalAttention, x_SD: Tensor, word_S: Tensor) -> Tensor:
    """Row by row and head by head, over the full square."""
    q_SD, k_SD, v_SD = attention.query(x_SD), attention.key(x_SD), attention.value(x_SD)
    width, out = x_SD.shape[1] // attention.heads, []
    for q, k, v, word in zip(*(split(part, SHAPES) for part in (q_SD, k_SD, v_SD, word_S)), strict=True):
        rows, length = word.shape
        mask_BHLL = torch.ones(rows, attention.heads, length, length, dtype=x_SD.dtype)
        if attention.dropout.active:
            mask_BHLL = attention.dropout.weight_mask(word, length, x_SD.dtype).view(mask_BHLL.shape)
            mask_BHLL = mask_BHLL / (1 - attention.dropout.p)
        for row in range(rows):
            mixed = []
            for head in range(attention.heads):
                part = slice(head * width, (head + 1) * width)
                score_LL = q[row, :, part] @ k[row, :, part].T / width**0.5
                score_LL = score_LL.masked_fill(~torch.ones(length, length).bool().tril(), float("-inf"))
                mixed.append((score_LL.softmax(-1) * mask_BHLL[row, head]) @ v[row, :, part])
            out.append(torch.cat(mixed, -1))
    written_out: Tensor = attention.out(torch.cat(out))
    return written_out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("heads", [1, 2])
def test_values_and_gradients_equal_the_equation_written_out(heads: int, dropout: float) -> None:
    attention, word_S = _attention(heads, dropout), _words()
    x_SD = torch.randn(SLOTS, 8, dtype=torch.float64, requires_grad=True)
    weight_SD = torch.randn(SLOTS, 8, dtype=torch.float64)
    found, gradients = [], []
    for out_SD in (attention(x_SD, x_SD, word_S, SHAPES), _written_out(attention, x_SD, word_S)):
        found.append(out_SD)
        gradients.append(torch.autograd.grad((out_SD * weight_SD).sum(), [x_SD, *attention.parameters()]))
    torch.testing.assert_close(*found)
    for ours, written_out in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, written_out)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_single_positions_equal_those_of_all(dropout: float) -> None:
    attention, word_S = _attention(2, dropout), _words()
    x_SD = torch.randn(SLOTS, 8, dtype=torch.float64)
    last_X = torch.tensor([129, 70, 63, 4, 0, 2, 0])
    start_X = torch.tensor([0, 130, 260, 324, 329, 334, 339])
    slot_X = start_X + last_X
    found_XD = attention.last(x_SD[slot_X], x_SD, word_S[slot_X], SHAPES, last_X)
    torch.testing.assert_close(found_XD, attention(x_SD, x_SD, word_S, SHAPES)[slot_X])


def test_a_rank_without_users_gets_zero_gradients() -> None:
    attention, nothing = _attention(2, 0.3), torch.zeros(0, 8, dtype=torch.float64)
    word = torch.zeros(0, dtype=torch.int32)
    attention(nothing, nothing, word, ((0, 5),)).sum().backward()
    for parameter in attention.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_relu_and_residual_are_those_of_the_dropped_tensor() -> None:
    dropout, word_X = HashDropout(0.3, (16,), address=1), _words()
    x_XD = torch.randn(SLOTS, 16, dtype=torch.float64, requires_grad=True)
    residual_XD, weight_XD = torch.randn(2, SLOTS, 16, dtype=torch.float64)
    dropped_XD = dropout(x_XD, word_X)
    for found_XD, expected_XD in (
        (dropout.relu(x_XD, word_X), dropped_XD.relu()),
        (dropout.added(x_XD, residual_XD, word_X), residual_XD + dropped_XD),
    ):
        torch.testing.assert_close(found_XD, expected_XD)
        one, other = (
            torch.autograd.grad((out * weight_XD).sum(), x_XD, retain_graph=True)[0] for out in (found_XD, expected_XD)
        )
        torch.testing.assert_close(one, other)


def _kept(
    p: float = 0.3, *, seed: int = 1, address: int = 0, rows: int = 64, first: int = 0, width: int = 256
) -> Tensor:
    torch.manual_seed(seed)
    row_X = torch.arange(first, first + rows).repeat_interleave(20)
    word_X = position_words(row_X, torch.arange(20).repeat(rows))
    out_XD: Tensor = HashDropout(p, (width,), address).train()(torch.ones(rows * 20, width), word_X)
    assert set(out_XD.flatten().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    return out_XD > 0


def test_the_share_dropped_is_p() -> None:
    for p in (0.05, 0.1, 0.5):
        kept_XD = _kept(p).float()
        assert abs(float(1 - kept_XD.mean()) - p) < 5 * (p * (1 - p) / kept_XD.numel()) ** 0.5
        for share in (kept_XD.mean(0), kept_XD.mean(1)):
            assert (share - (1 - p)).abs().max() < 6 * (p * (1 - p) / 256) ** 0.5


def test_masks_of_different_addresses_are_independent() -> None:
    base = _kept().float() - 0.7
    others = [_kept(seed=2), _kept(address=1), *(_kept(address=2**k) for k in range(1, 8))]
    others += [_kept().roll(shift, axis) for axis in (0, 1) for shift in (1, 2, 20, 32)]  # 20: the next row
    for other in others:
        correlation = float((base * (other.float() - 0.7)).mean()) / 0.21
        assert abs(correlation) < 5 / base.numel() ** 0.5
    # The agreement of two positions spreads over all pairs of positions as that of independent ones does.
    centred = base / 0.21**0.5
    agreement = (centred @ centred.T / 256**0.5).triu(1).flatten()
    agreement = agreement[agreement != 0]
    assert abs(float(agreement.std()) - 1) < 0.02


def test_masks_follow_rows_of_the_global_batch() -> None:
    assert torch.equal(_kept(rows=64)[20 * 10 : 20 * 15], _kept(rows=5, first=10))


def test_evaluation_changes_nothing() -> None:
    x_XD = torch.randn(3, 5)
    assert torch.equal(HashDropout(0.5, (5,), 0).eval()(x_XD, None), x_XD)
    assert torch.equal(HashDropout(0.0, (5,), 0).train()(x_XD, None), x_XD)
