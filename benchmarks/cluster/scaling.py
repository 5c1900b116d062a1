"""Weak scaling without a cluster: what a step of LLM-SRec takes on 8 to 256 devices, 20 users each.

    python -m benchmarks.cluster.scaling            prints the tables
    python -m benchmarks.cluster.scaling --write    puts them into scaling.md

FLOPs and memory are counted as by `launchers/plan.py`, bytes and calls as by `trainer/planner/traffic.py`.
A collective of N bytes over n devices takes, for each time it goes around,

    ring           base + (inner hops + outer hops) + N (n-1)/n / rate of the slowest link on the ring
    hierarchical   as a ring within each node, then rings between nodes for each device's share, one after the other

which is NCCL's own model of a ring (`src/graph/tuning.cc`). Nothing overlaps, with each other or with computing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

from benchmarks.common.setting import LLMS, PRESET
from trainer.config import LLMSRecConfig, load_config
from trainer.planner.costs import Load, forward_flops
from trainer.planner.devices import DeviceKind, device
from trainer.planner.forecast import Option, StepPlanner
from trainer.planner.llm_shape import LLMShape
from trainer.planner.traffic import Rings, Traffic, term_rings
from trainer.planner.trainable_params import trained_parameters

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- python -m benchmarks.cluster.scaling --write -->\n", "<!-- end -->\n"

SIZES = (8, 16, 32, 64, 128, 256)
PER_NODE = 8
USERS = 20
"""A device."""
_STEP = Load(
    useful=9334, frozen=1200, trained=6823, frozen_pairs=55753, trained_pairs=1824116, queries=7097, keys=20267,
    readouts=97,
)  # fmt: skip
"""20 users of MovieLens-100k with SmolLM2's tokenizer: means of `Workload.training(1, 1)`."""
_ITEMS = Load(
    useful=3886, frozen=1337, trained=1152, frozen_pairs=55293, trained_pairs=38588, queries=1152, keys=4288,
    readouts=128,
)  # fmt: skip
_HISTORIES = Load(
    useful=44748, frozen=2155, trained=39179, frozen_pairs=164758, trained_pairs=12406792, queries=41362, keys=119091,
    readouts=128,
)  # fmt: skip
"""128 items and 128 users of a validation, counted likewise."""
CATALOG, EVALUATED = 25_764, 10_000
"""Items of Amazon Scientific in the paper, and users of a validation."""

_BASE = 8.4e-6
"""Seconds of a call, as of a hop below: of NCCL's ring with the protocol for large messages (`tuning.cc`)."""


@dataclass(frozen=True)
class Link:
    """Between neighbours on a ring."""

    rate: float
    """Bytes a second."""
    hop: float
    """Seconds."""


@dataclass(frozen=True)
class Network:
    """Nodes of eight devices."""

    name: str
    inside: Link
    between: Link
    """Of a whole node."""

    def ring(self, rings: Rings, devices: int, turns: int = 1) -> float:
        """Seconds of collectives that go around all devices, one call after the other."""
        nodes = math.ceil(devices / PER_NODE)
        hops = (devices - nodes) * self.inside.hop + (nodes - 1) * self.between.hop
        rate = self.inside.rate if nodes == 1 else min(self.inside.rate, self.between.rate)
        return rings.calls * (_BASE + turns * hops) + turns * rings.whole * (devices - 1) / devices / rate

    def hierarchical(self, rings: Rings, devices: int, turns: int = 1) -> float:
        """The same within nodes and then between them: fewer hops, and the bytes wait twice."""
        nodes = devices // PER_NODE
        if nodes < 2:
            return self.ring(rings, devices, turns)
        between = turns * rings.whole * (nodes - 1) / nodes / self.between.rate  # all shares of a node on one link
        hops = rings.calls * (_BASE + turns * (nodes - 1) * self.between.hop)
        return self.ring(rings, PER_NODE, turns) + hops + between


@dataclass(frozen=True)
class Way:
    """What is split over which devices."""

    name: str
    stage: int
    in_node: bool = False
    """ZeRO-3 that keeps a second copy of all weights in each node and gathers from that (`zero_hpz_partition_size`)."""


WAYS = (Way("0", 0), Way("1", 1), Way("2", 2), Way("3 in a node", 3, in_node=True), Way("3 over all", 3))

# Hops: NCCL's `tuning.cc`. Between nodes an adapter of 100 Gb/s gives 12 GB/s (NVIDIA/nccl-tests, issue 119), one of
# 400 Gb/s 46 to 48 (issue 290), both by RDMA; 25 Gb/s as a quarter of the first. Inside: `trainer/planner/devices.py`.
_PCIE = Link(device("a6000", 1).link, 5.7e-6)
_NVLINK = Link(device("h200", 1).link, 3.4e-6)
_ETHERNET_25, _ETHERNET_100, _INFINIBAND = (Link(rate, 9.6e-6) for rate in (3e9, 12e9, 47e9))
CLUSTERS: Sequence[tuple[DeviceKind, Network]] = (
    ("a6000", Network("25 GbE", _PCIE, _ETHERNET_25)),
    ("a6000", Network("100 GbE", _PCIE, _ETHERNET_100)),
    ("h200", Network("100 GbE", _NVLINK, _ETHERNET_100)),
    ("h200", Network("400G InfiniBand", _NVLINK, _INFINIBAND)),
)


@dataclass(frozen=True)
class Case:
    """One LLM on one cluster."""

    llm: str
    kind: DeviceKind
    network: Network

    @property
    def names(self) -> list[str]:
        """In tables."""
        return [self.llm.rpartition("-")[2], self.kind.upper(), self.network.name]

    def option(self, way: Way, devices: int, *, hierarchical: bool = False) -> Option | None:
        """The fastest step; None: it does not fit."""
        seconds = partial(self._exchange, way, devices, hierarchical)
        planner = self.planner(devices, seconds)
        if way.in_node and devices > PER_NODE:
            planner = replace(planner, set_aside=planner.shape.weight_bytes(2, one_byte=False) // PER_NODE)
        return planner.fastest(_split, _counts(), (way.stage,))

    def efficiency(self, option: Option) -> float:
        """Of the speed of a device alone; where it cannot run alone, of one whose exchange takes no time."""
        alone = _alone(self)
        seconds = alone.step_seconds if alone else option.step_flops / self.planner(1).rate
        return seconds / option.step_seconds

    def validation(self, devices: int) -> float:
        """Seconds: items and users are shared among ranks, the items' vectors gathered."""
        planner = self.planner(devices)
        flops = sum(
            math.ceil(count / devices) / load.readouts * forward_flops(planner.shape, load)
            for load, count in ((_ITEMS, CATALOG), (_HISTORIES, EVALUATED))
        )
        vectors = Rings(4 * CATALOG * _system().projected_dim, 1)
        return flops / planner.rate + (self.network.ring(vectors, devices) if devices > 1 else 0.0)

    def planner(self, ranks: int, exchange: partial[float] | None = None) -> StepPlanner:
        """Of steps of that many devices; without `exchange` in one node and without latency."""
        system, shape = _system(), LLMShape.of_settings(LLMS[self.llm], self.llm)
        trained = trained_parameters(system, shape, teacher_dim=64, item_dim=64)
        return StepPlanner(shape, system.llm, trained, device(self.kind, ranks), ranks, exchange=exchange)

    def _exchange(self, way: Way, devices: int, hierarchical: bool, traffic: Traffic) -> float:
        over_all = self.network.hierarchical if hierarchical else self.network.ring
        terms = term_rings(_system(), USERS * devices, devices)
        seconds = over_all(traffic.reduced, devices, turns=2)
        seconds += sum(over_all(rings, devices) for rings in (traffic.gathered, traffic.scattered, terms))
        return seconds + over_all(traffic.repeated, PER_NODE if way.in_node else devices)


@cache
def _alone(case: Case) -> Option | None:
    """The fastest step of one device; None: it does not fit."""
    return case.planner(1).fastest(_split, _counts(), (0,))


@cache
def _system() -> LLMSRecConfig:
    system = load_config(PRESET, ["system.llm.dtype=bfloat16"]).system
    assert isinstance(system, LLMSRecConfig)
    return system


def _counts() -> set[int]:
    """Numbers of micro-batches."""
    return {math.ceil(USERS / users) for users in range(1, USERS + 1)}


def _split(micro_batches: int) -> list[list[Load]]:
    """A step in equal parts: what prompts share is not counted anew."""
    part = Load(**{field.name: math.ceil(getattr(_STEP, field.name) / micro_batches) for field in fields(Load)})
    return [[part] * micro_batches]


def tables() -> str:
    """Everything, as Markdown."""
    cases = [Case(llm, kind, network) for llm in LLMS for kind, network in CLUSTERS]
    found = {case: {way: [case.option(way, devices) for devices in SIZES] for way in WAYS} for case in cases}
    steps = [_row(case, way, options) for case in cases for way, options in found[case].items() if options[0]]
    fastest = [
        [
            *case.names,
            *(_winner({way: options[at] for way, options in found[case].items()}) for at in range(len(SIZES))),
        ]
        for case in cases
    ]
    validations = [_validation_row(case) for case in cases if _alone(case)]
    sizes, left = [str(devices) for devices in SIZES], ["LLM", "devices", "between nodes"]
    return "\n\n".join([
        "### Efficiency of a step",
        _table([*left, "ZeRO", "run as", "GB at 8", "s at 8", *sizes, f"{SIZES[-1]} hier."], 5, steps),
        "### The fastest ZeRO stage",
        _table([*left, *sizes], len(left) + len(sizes), fastest),
        "### Efficiency of a validation",
        _table([*left, "s on one", *sizes], 3, validations),
    ])  # fmt: skip


def _table(head: Sequence[str], words: int, rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _row(case: Case, way: Way, options: Sequence[Option | None]) -> list[str]:
    first = options[0]
    assert first
    parts = "whole" if first.micro_batches == 1 else f"{first.micro_batches} parts"
    how = parts + ", recomputing" * first.recompute
    last = case.option(way, SIZES[-1], hierarchical=True)
    shares = [f"{case.efficiency(option):.0%}" if option else "-" for option in [*options, last]]
    return [*case.names, way.name, how, f"{first.bytes.total / 1e9:.1f}", f"{first.step_seconds:.3g}", *shares]


def _validation_row(case: Case) -> list[str]:
    one = case.validation(1)
    return [*case.names, f"{one:.0f}", *(f"{one / devices / case.validation(devices):.0%}" for devices in SIZES)]


def _winner(options: dict[Way, Option | None]) -> str:
    fitting = {way: option.step_seconds for way, option in options.items() if option}
    best = min(fitting.values(), default=None)
    # Within half a percent nobody could tell.
    return ", ".join(way.name for way, seconds in fitting.items() if best and seconds <= 1.005 * best) or "none fits"


def page_with(text: str, new: str) -> str:
    """The page with other tables in it."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + new + "\n\n" + END + rest.partition(END)[2]


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(prog="benchmarks.cluster.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page_with(PAGE.read_text(), tables()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
