"""Measure a training step and user vectors of SASRec against pmixer/SASRec.pytorch, in turns.

    git clone https://github.com/pmixer/SASRec.pytorch && git worktree add ../before 16235ad
    python -m benchmarks.id_models --peer SASRec.pytorch [--before ../before] [--lengths 50 200]

One thread; each side runs in a process of its own, and one step of each follows the other. Users are random, with the
sizes and lengths of MovieLens-1M. The peer's training step is that of its main.py, with its model and its sampler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.machine import RESULTS, describe, write
from trainer.config import SASRecConfig
from trainer.data.collators.sequences import SequenceCollator, SequenceTraining
from trainer.data.reading.histories import Histories, Users
from trainer.device import keep_freed_memory
from trainer.models.by_id.sasrec import SASRec

_USERS, _ITEMS, _BATCH = 6040, 3416, 128
_DIM, _DROPOUT, _LR, _BETAS = 50, 0.2, 1e-3, (0.9, 0.98)  # defaults of the peer's main.py
_ROOT = Path(__file__).parents[1]
Work = Callable[[int], object]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.id_models", description=__doc__.split("\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="checkout of pmixer/SASRec.pytorch")
    parser.add_argument("--before", type=Path, help="checkout of this repository at an earlier commit, to compare with")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each kind, after two that warm up")
    parser.add_argument("--out", type=Path, default=RESULTS / "id_models.json")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        _serve(options.serve[0], int(options.serve[1]), options.peer)
        return
    lengths = {str(length): _measure(length, options) for length in options.lengths}
    result = {"machine": describe(), "peer": _commit(options.peer), "users": _USERS, "items": _ITEMS, "batch": _BATCH,
              "dim": _DIM, "dropout": _DROPOUT, "lengths": lengths}  # fmt: skip
    write(options.out, result)
    print(result["machine"])
    for length, found in lengths.items():
        print(f"\nlength {length}: with the same weights, without padding: {found['same weights']}")
        for work, sides in found["cpu_ms"].items():
            row = [f"{side} {ms:.1f} ms ({found['ratio'][work][side]:.2f})" for side, ms in sides.items()]
            print(f"  {work:24}" + ", ".join(row))


def _measure(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, by kind of work and side; ratios are medians of the rounds' ratios."""
    paths = {"peer": _ROOT, "ours": _ROOT, "ours, padding visible": _ROOT}
    if options.before:
        paths["before"] = options.before.resolve()
    servers = {side: _start(side, path, length, options.peer.resolve()) for side, path in paths.items()}
    found: dict[str, Any] = {"same weights": _ask(servers["peer"], "check", 0)["value"]}
    for unit in ("cpu_ms", "wall_ms", "ratio"):
        found[unit] = {}
    for work in ("step", "step and sampling", "user vectors"):
        rounds = [
            {side: _ask(server, work, at) for side, server in servers.items()} for at in range(options.rounds + 2)
        ]
        for unit in ("cpu_ms", "wall_ms"):
            found[unit][work] = {side: statistics.median(r[side][unit] for r in rounds[2:]) for side in servers}
        found["ratio"][work] = {
            side: statistics.median(r["peer"]["cpu_ms"] / r[side]["cpu_ms"] for r in rounds[2:]) for side in servers
        }
    found["profile"] = _ask(servers["ours"], "profile", 0)["value"]
    for server in servers.values():
        server.stdin.close()
        server.wait()
    return found


def _start(side: str, path: Path, length: int, peer: Path) -> Any:
    command = [sys.executable, __file__, "--peer", str(peer), "--serve", side, str(length)]
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=path
    )


def _ask(server: Any, work: str, at: int) -> dict[str, Any]:
    server.stdin.write(json.dumps([work, at]) + "\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return answer


def _serve(side: str, length: int, peer: Path) -> None:
    """Run the work named on each line of stdin and answer with its milliseconds, or with what it found."""
    keep_freed_memory()  # as training does; for the peer too
    torch.manual_seed(0)
    works = _peer(length, peer) if side == "peer" else _ours(length, mask_padding=side != "ours, padding visible")
    for line in sys.stdin:
        work, at = json.loads(line)
        if work in ("check", "profile"):
            print(json.dumps({"value": works[work](at)}), flush=True)
            continue
        prepared = f"prepare {work}"
        given = works[prepared](at) if prepared in works else at
        wall, cpu = time.perf_counter(), time.process_time()
        works[work](given)
        spent = {"cpu_ms": 1e3 * (time.process_time() - cpu), "wall_ms": 1e3 * (time.perf_counter() - wall)}
        print(json.dumps(spent), flush=True)


def _ours(length: int, *, mask_padding: bool) -> dict[str, Callable[[Any], Any]]:
    config = SASRecConfig(
        name="sasrec", dim=_DIM, max_length=length, dropout=_DROPOUT, norm="post", mask_padding=mask_padding
    )
    model = SASRec(config, _ITEMS)
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, betas=_BETAS)
    users = _users()
    collator = SequenceCollator(_ITEMS, length, negatives=1, fixed_length=not mask_padding, seed=0)

    def step(batch: SequenceTraining) -> float:
        model.train()
        loss = model.loss(model(batch)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def vectors(batch: SequenceTraining) -> Tensor:
        return model.eval().user_vectors(batch.input)

    def collate(at: int) -> SequenceTraining:
        return collator.train(users.take(_rows(at)), slice(0, _BATCH), epoch=at)

    def profile(at: int) -> dict[str, float]:
        """Shares of a step's time by operator; not seconds, which other work on the machine prolongs."""
        batch, rounds = collate(at), 10
        with torch.profiler.profile() as profiler:
            for _ in range(rounds):
                step(batch)
        spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        share = {name: round(time / sum(spent.values()), 3) for name, time in spent.items()}
        return dict(sorted(share.items(), key=lambda item: -item[1])[:25])

    return {"prepare step": collate, "step": step, "step and sampling": lambda at: step(collate(at)),
            "prepare user vectors": collate, "user vectors": vectors, "profile": profile}  # fmt: skip


def _peer(length: int, path: Path) -> dict[str, Callable[[Any], Any]]:
    """The training step of the peer's main.py, with its arguments' defaults."""
    sys.path.insert(0, str(path / "python"))
    import model as peer_model  # type: ignore[import-not-found]
    import utils as peer_utils  # type: ignore[import-not-found]

    settings = SimpleNamespace(hidden_units=_DIM, maxlen=length, dropout_rate=_DROPOUT, num_blocks=2, num_heads=1,
                               device="cpu", norm_first=False)  # fmt: skip
    model = peer_model.SASRec(_USERS, _ITEMS, settings)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter.data)
    model.pos_emb.weight.data[0] = model.item_emb.weight.data[0] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, betas=_BETAS)
    cross_entropy = torch.nn.BCEWithLogitsLoss()
    users, prepare = _users(), _ours(length, mask_padding=True)["prepare step"]
    sequences = dict(enumerate(np.split(users.train.item_E, users.train.offset_U1[1:-1]), 1))
    histories = {user: items.tolist() for user, items in sequences.items()}

    def arrays(at: int) -> list[np.ndarray]:
        """Our collator's batch, so that both sides train on the same one."""
        batch: SequenceTraining = prepare(at)
        found = [batch.input.item_BL, batch.target_BL, batch.negative_BLK[:, :, 0]]
        return [np.pad(x.numpy(), ((0, 0), (length - x.shape[1], 0))) for x in found]

    def step(batch: list[np.ndarray]) -> float:
        model.train()
        items, positives, negatives = batch
        positive, negative = model(None, items, positives, negatives)
        ones, zeros = torch.ones(positive.shape), torch.zeros(negative.shape)
        optimizer.zero_grad()
        real = np.where(positives != 0)
        loss = cross_entropy(positive[real], ones[real]) + cross_entropy(negative[real], zeros[real])
        for parameter in model.item_emb.parameters():
            loss = loss + 0.0 * torch.sum(parameter**2)  # its l2_emb, 0 by default
        loss.backward()
        optimizer.step()
        return float(loss.item())

    def sampled(at: int) -> float:
        columns = _Once()
        with contextlib.suppress(StopIteration):
            peer_utils.sample_function(histories, _USERS, _ITEMS, _BATCH, length, columns, at)
        return step([np.array(column) for column in list(columns.batch)[1:]])

    @torch.no_grad()
    def vectors(batch: list[np.ndarray]) -> Tensor:
        states: Tensor = model.eval().log2feats(batch[0])
        return states[:, -1]

    return {"prepare step": arrays, "step": step, "step and sampling": sampled, "prepare user vectors": arrays,
            "user vectors": vectors, "check": lambda at: _differences(model, length)}  # fmt: skip


class _Once:
    """Takes the first batch of the peer's sampler, which never ends, and stops it."""

    batch: Any = ()

    def put(self, batch: Any) -> None:
        self.batch = batch
        raise StopIteration


@torch.no_grad()
def _differences(peer: Any, length: int) -> dict[str, float]:
    """Differences from the peer with the peer's weights, on sequences without padding and without dropout."""
    ours = SASRec(SASRecConfig(name="sasrec", dim=_DIM, max_length=length, norm="post"), _ITEMS).eval()
    weights = {"items.weight": peer.item_emb.weight, "positions.weight": peer.pos_emb.weight[1:]}
    weights |= {f"norm.{name}": p for name, p in peer.last_layernorm.named_parameters()}
    for at, (attention, feed) in enumerate(zip(peer.attention_layers, peer.forward_layers, strict=True)):
        for kind in ("weight", "bias"):
            parts = getattr(attention, f"in_proj_{kind}").chunk(3)
            weights |= {
                f"blocks.{at}.attention.{n}.{kind}": p for n, p in zip(("query", "key", "value"), parts, strict=True)
            }
            weights[f"blocks.{at}.attention.out.{kind}"] = getattr(attention.out_proj, kind)
            weights[f"blocks.{at}.attention_norm.{kind}"] = getattr(peer.attention_layernorms[at], kind)
            weights[f"blocks.{at}.feed_norm.{kind}"] = getattr(peer.forward_layernorms[at], kind)
        for name, layer in (("expand", feed.conv1), ("contract", feed.conv2)):
            weights |= {f"blocks.{at}.{name}.weight": layer.weight[:, :, 0], f"blocks.{at}.{name}.bias": layer.bias}
    ours.load_state_dict(weights)
    users = _users()
    long = np.flatnonzero(users.train.length_U > length)[:_BATCH]
    collator = SequenceCollator(_ITEMS, length, negatives=1, fixed_length=True, seed=0)
    batch = collator.train(users.take(long), slice(0, len(long)), epoch=0)
    peer.eval()
    given = [x.numpy() for x in (batch.input.item_BL, batch.target_BL, batch.negative_BLK[:, :, 0])]
    positive, negative = peer(None, *given)
    softplus = torch.nn.functional.softplus
    loss = float(softplus(-positive).mean() + softplus(negative).mean())
    apart_BD = peer.log2feats(given[0])[:, -1] - ours.user_vectors(batch.input)
    return {
        "loss": loss,
        "difference of losses": abs(loss - float(ours.loss(ours(batch)).total)),
        "largest difference of user vectors": float(apart_BD.abs().max()),
    }


def _users() -> Users:
    """Random users with the sizes of MovieLens-1M: 20 to 2,314 ratings, median 96, mean 165; the last two held out."""
    rng = np.random.default_rng(0)
    length_U = np.clip(np.exp(rng.normal(np.log(96), 1.06, _USERS)), 20, 2314).astype(int) - 2
    offset_U1 = np.concatenate([[0], np.cumsum(length_U)])
    item_E = rng.integers(1, _ITEMS + 1, offset_U1[-1])
    none_U = np.zeros(_USERS, np.int64)
    train = Histories(np.arange(_USERS), offset_U1, item_E, np.zeros_like(item_E))
    return Users(train, none_U, none_U, none_U, none_U)


def _rows(at: int) -> np.ndarray:
    """Users of a step."""
    return np.random.default_rng((1, at)).choice(_USERS, _BATCH, replace=False)


def _commit(path: Path) -> str:
    command = ["git", "-C", str(path), "rev-parse", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
