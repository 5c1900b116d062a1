"""Measure what each saving gives, one after the other, from the published step to ours, in one run.

    python -m benchmarks.ladder [--layers 30] [--users 20] [--steps 2] [--title-store FOLDER]

Each rung keeps all savings of the rungs above and adds one. All start from the same weights and run the same users with
the same negatives, in turns as in `training.py`, and their losses must agree. FLOPs are counted by torch, so a busy
machine does not change them; seconds are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.plain import PlainLLMSRec, PlainPrompts
from benchmarks.common.setting import PRESET, add_arguments, overrides
from benchmarks.training import Way, batches_of, built, llm_of, take_turns
from trainer.config import RunConfig, load_config
from trainer.data.collators.retrieval import RetrievalCollator, RetrievalTraining
from trainer.data.prompts import packing
from trainer.data.prompts.packing import PackedPrompts, StreamWriter, pack
from trainer.data.prompts.prompt import Prompt
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.device import keep_freed_memory
from trainer.nn.llm.attention import DecoderPass
from trainer.nn.llm.backbone import FrozenLLM
from trainer.planner.llm_shape import LLMShape


@dataclass(frozen=True)
class Rung:
    """Our step with some savings left out; by default it has all of them."""

    name: str
    recompute: bool = False
    fused: bool = True
    readouts_only: bool = True
    """The last layer computes the read-outs only."""
    each_item_once: bool = True
    shared_beginnings: bool = True
    frozen_prefix: bool = True


_FIRST = Rung(
    "prompts end to end, no padding", recompute=True, fused=False, readouts_only=False, each_item_once=False,
    shared_beginnings=False, frozen_prefix=False,
)  # fmt: skip
_ADDED: Sequence[tuple[str, dict[str, bool]]] = [
    ("activations kept", {"recompute": False}),
    ("last layer at the read-outs", {"readouts_only": True}),
    ("each item once per batch", {"each_item_once": True}),
    ("shared prefixes once", {"shared_beginnings": True}),
    ("no gradient before the first slot", {"frozen_prefix": True}),
    ("norms and gated products fused", {"fused": True}),
]


def rungs() -> list[Rung]:
    """From our step with only the padding left out to all of its savings except a prefix cache."""
    found = [_FIRST]
    for name, change in _ADDED:
        found.append(replace(found[-1], name=name, **change))
    return found


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    config = _config(options)
    dataset = open_dataset(config.data.path, full_check=False)
    ways = [
        published("published, recomputing", config, dataset, head=True),
        published("no LM head, hidden states or cache", config, dataset, head=False),
        *(step_of(rung, _config(options, f"system.llm.recompute={rung.recompute}"), dataset) for rung in rungs()),
    ]
    if options.title_store:
        cached = _config(options, f"system.llm.title_store={options.title_store}")
        ways.append(step_of(Rung("titles from a prefix cache"), cached, dataset))
    batches = list(islice(batches_of(config, dataset), options.steps + 1))
    prompts = PlainPrompts(built(config, dataset)[1], llm_of(config), dataset.titles)
    lengths = [prompts.useful_lengths(users, 0) for users in batches]
    shape = LLMShape.of_folder(Path(llm_of(config).path), llm_of(config).layers)
    take_turns(ways, batches, [(shape, sum(step)) for step in lengths])
    result = {
        "machine": describe(),
        "llm": f"{Path(options.llm).name}, {shape.layers} layers, fp32",
        "data": str(options.data),
        "users_a_step": options.users,
        "steps": options.steps,
        "largest_loss_difference": max(
            abs(a - b) for way in ways for a, b in zip(way.losses, ways[0].losses, strict=True)
        ),
        "rungs": _table(ways, options.users),
    }
    write(options.out, result)
    _print(result)


def published(name: str, config: RunConfig, dataset: Dataset, *, head: bool) -> Way:
    """The published step, with recomputation; without `head` it leaves out the outputs that are not used."""
    model, collator = built(config, dataset)
    plain = PlainLLMSRec(model, collator, llm_of(config), dataset.titles, recompute=True, head=head)
    return Way(name, model, lambda users: plain.terms(users, 0))


def step_of(rung: Rung, config: RunConfig, dataset: Dataset) -> Way:
    """Our step with the savings of the rung; `config.system.llm.recompute` must be the rung's."""
    model, collator = built(config, dataset)
    if not rung.fused:
        for module in model.reader.llm.decoder.modules():
            # Undoes `fuse`, which sets `forward` on instances. Layers keep the one that the attention sets.
            if not hasattr(module, "self_attn"):
                vars(module).pop("forward", None)
    if not rung.readouts_only:
        _run_last_layer_whole(model.reader.llm, recompute=rung.recompute)
    if rung != Rung(rung.name):
        packs = partial(pack, frozen_prefix=rung.frozen_prefix)
        context = nullcontext if rung.shared_beginnings else _prefixes_apart
        collator = replace(collator, pack=lambda prompts: _packed(packs, context, prompts))
    build = _batch if rung.each_item_once else _batch_with_repeated_items
    return Way(rung.name, model, lambda users: model(build(collator, users)))


def _packed(
    packs: Callable[[Sequence[Prompt]], PackedPrompts],
    context: Callable[[], AbstractContextManager[Any]],
    prompts: Sequence[Prompt],
) -> PackedPrompts:
    with context():
        return packs(prompts)


def _prefixes_apart() -> AbstractContextManager[Any]:
    """While active, `pack` writes the prefix of each prompt on its own instead of sharing it."""

    def apart(stream: StreamWriter, prefixes: Sequence[IntArray]) -> list[IntArray]:
        return [stream.add(token_T, token_T[:0]) for token_T in prefixes]

    return patch.object(packing, "write_prefixes", apart)


def _batch(collator: RetrievalCollator, users: Users) -> RetrievalTraining:
    return collator.train(users, slice(0, len(users)), 0)


def _batch_with_repeated_items(collator: RetrievalCollator, users: Users) -> RetrievalTraining:
    """The batch of `_batch`, but with a separate prompt for each candidate of each user."""
    seen: list[Prompt] = []

    def record(prompts: Sequence[Prompt]) -> PackedPrompts:
        seen.extend(prompts)
        return collator.pack(prompts)

    batch = _batch(replace(collator, pack=record), users)
    users_prompts = len(seen) - int(batch.candidate_YC.max()) - 1  # item prompts follow them, each once
    items = [seen[users_prompts + int(item)] for item in batch.candidate_YC.flatten()]
    index_YC = torch.arange(len(items)).view_as(batch.candidate_YC)
    return replace(batch, prompts=collator.pack([*seen[:users_prompts], *items]), candidate_YC=index_YC)


def _run_last_layer_whole(llm: FrozenLLM, *, recompute: bool) -> None:
    """Make the last layer compute every position, and select the read-outs from its output."""
    layers: Any = llm.decoder.layers
    last = layers[-1]
    whole = type(last).forward

    def forward(hidden_states: Tensor, *, segments: DecoderPass, **kwargs: Any) -> Tensor:
        out: Tensor = whole(last, hidden_states, segments=segments, **kwargs)
        return out[:, :0] if segments.readout_R is None else out[:, segments.readout_R]

    last.forward = partial(checkpoint, forward, use_reentrant=False) if recompute else forward


def _table(ways: Sequence[Way], users: int) -> list[dict[str, Any]]:
    """One row per rung, compared with the rung above and with the first."""
    table: list[dict[str, Any]] = []
    for way in ways:
        seconds, tflop = way.median_seconds, way.flops / users / 1e12
        above = table[-1] if table else {"seconds_a_step": seconds, "tflop_a_user": tflop}
        first = table[0] if table else above
        table.append(
            {
                "name": way.name,
                "tflop_a_user": round(tflop, 5),
                "seconds_a_step": round(seconds, 3),
                "fewer_flops": round(above["tflop_a_user"] / tflop, 3),
                "faster": round(above["seconds_a_step"] / seconds, 3),
                "fewer_flops_in_all": round(first["tflop_a_user"] / tflop, 2),
                "faster_in_all": round(first["seconds_a_step"] / seconds, 2),
            }
        )
    return table


def _print(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\n{result['llm']}; {result['users_a_step']} users per step; losses differ by at most "
          f"{result['largest_loss_difference']:.1e}\n")  # fmt: skip
    heads = ("TFLOP/user", "s/step", "FLOPs", "time", "in all", "in all")
    print(f"{'':36}" + "".join(f"{head:>11}" for head in heads))
    for row in result["rungs"]:
        print(f"{row['name']:36}{row['tflop_a_user']:11.4f}{row['seconds_a_step']:11.2f}{row['fewer_flops']:10.2f}x"
              f"{row['faster']:10.2f}x{row['fewer_flops_in_all']:10.2f}x{row['faster_in_all']:10.2f}x")  # fmt: skip


def _config(options: argparse.Namespace, *changes: str) -> RunConfig:
    return load_config(PRESET, [*overrides(options), f"train.batch_size={options.users}", *changes])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.ladder", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--users", type=int, default=20, help="users per step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each rung, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument(
        "--title-store", type=Path, help="prefix cache written by launchers/title_store.py; adds the last rung"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "ladder.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
