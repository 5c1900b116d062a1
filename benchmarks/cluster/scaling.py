"""Compute weak scaling without a cluster: the time of a step of LLM-SRec on 8 to 256 devices, 20 users each.

    python -m benchmarks.cluster.scaling            prints the tables
    python -m benchmarks.cluster.scaling --write    writes them into scaling.md

FLOPs and memory are those of `launchers/plan.py`, bytes and calls those of `trainer/planner/traffic.py`.
A collective of N bytes over n devices takes, for each turn around the ring,

    ring           base + (inner hops + outer hops) + N (n-1)/n / rate of the slowest link on the ring
    hierarchical   as a ring within each node, then rings between nodes for each device's share, one after the other

which is NCCL's own model of a ring (`src/graph/tuning.cc`). Nothing overlaps, neither collectives with each other nor
with computing.
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
"""Per device."""
_STEP = Load(
    useful=9334, frozen=1200, trained=6823, frozen_pairs=55753, trained_pairs=1824116, queries=7097, keys=20267,
    readouts=97,
)  # fmt: skip
"""Load of 20 users of MovieLens-100k with SmolLM2's tokenizer: means of `Workload.training(1, 1)`."""
_ITEMS = Load(
    useful=3886, frozen=1337, trained=1152, frozen_pairs=55293, trained_pairs=38588, queries=1152, keys=4288,
    readouts=128,
)  # fmt: skip
_HISTORIES = Load(
    useful=44748, frozen=2155, trained=39179, frozen_pairs=164758, trained_pairs=12406792, queries=41362, keys=119091,
    readouts=128,
)  # fmt: skip
"""Loads of 128 items and of 128 users in a validation, counted in the same way."""
CATALOG, EVALUATED = 25_764, 10_000
"""Items of Amazon Scientific in the paper, and users of a validation."""

_BASE = 8.4e-6
"""Seconds per call. This and the seconds per hop below are NCCL's, for a ring with the protocol for large messages
(`tuning.cc`)."""


@dataclass(frozen=True)
class Link:
    """A link between neighbours on a ring."""

    rate: float
    """Bytes per second."""
    hop: float
    """Seconds per hop."""


@dataclass(frozen=True)
class Network:
    """Nodes of eight devices."""

    name: str
    inside: Link
    between: Link
    """Its rate is that of a whole node."""

    def ring(self, rings: Rings, devices: int, turns: int = 1) -> float:
        """Seconds of collectives over one ring of all devices, one call after the other.

        Args:
            turns: times that the bytes go around the ring: 2 for an all-reduce, otherwise 1.
        """
        nodes = math.ceil(devices / PER_NODE)
        hops = (devices - nodes) * self.inside.hop + (nodes - 1) * self.between.hop
        rate = self.inside.rate if nodes == 1 else min(self.inside.rate, self.between.rate)
        return rings.calls * (_BASE + turns * hops) + turns * rings.whole * (devices - 1) / devices / rate

    def hierarchical(self, rings: Rings, devices: int, turns: int = 1) -> float:
        """Seconds of a ring within each node, then one between nodes: fewer hops, but two transfers in sequence."""
        nodes = devices // PER_NODE
        if nodes < 2:
            return self.ring(rings, devices, turns)
        # Between nodes one link carries the shares of all devices of a node.
        between = turns * rings.whole * (nodes - 1) / nodes / self.between.rate
        hops = rings.calls * (_BASE + turns * (nodes - 1) * self.between.hop)
        return self.ring(rings, PER_NODE, turns) + hops + between


@dataclass(frozen=True)
class Way:
    """A ZeRO stage, and the devices over which it shards."""

    name: str
    stage: int
    in_node: bool = False
    """ZeRO-3 with a second copy of all weights in each node, from which devices gather (`zero_hpz_partition_size`)."""


WAYS = (Way("0", 0), Way("1", 1), Way("2", 2), Way("3 in a node", 3, in_node=True), Way("3 over all", 3))

# Hops are from NCCL's `tuning.cc`. Between nodes an adapter of 100 Gb/s gives 12 GB/s (NVIDIA/nccl-tests, issue 119),
# one of 400 Gb/s 46 to 48 (issue 290), both with RDMA; 25 Gb/s is taken as a quarter of the first. Rates inside a node
# are those of `trainer/planner/devices.py`.
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
        """LLM, devices and network, as the tables show them."""
        return [self.llm.rpartition("-")[2], self.kind.upper(), self.network.name]

    def option(self, way: Way, devices: int, *, hierarchical: bool = False) -> Option | None:
        """The settings of the fastest step; None: it does not fit."""
        seconds = partial(self._exchange, way, devices, hierarchical)
        planner = self.planner(devices, seconds)
        if way.in_node and devices > PER_NODE:
            planner = replace(planner, set_aside=planner.shape.weight_bytes(2, one_byte=False) // PER_NODE)
        return planner.fastest(_split, _counts(), (way.stage,))

    def efficiency(self, option: Option) -> float:
        """Speed per device relative to one device alone, or to computing alone where the LLM does not fit on one."""
        alone = _alone(self)
        seconds = alone.step_seconds if alone else option.step_flops / self.planner(1).rate
        return seconds / option.step_seconds

    def validation(self, devices: int) -> float:
        """Seconds of a validation: ranks share items and users, and all-gather the item vectors."""
        planner = self.planner(devices)
        flops = sum(
            math.ceil(count / devices) / load.readouts * forward_flops(planner.shape, load)
            for load, count in ((_ITEMS, CATALOG), (_HISTORIES, EVALUATED))
        )
        vectors = Rings(4 * CATALOG * _system().projected_dim, 1)
        return flops / planner.rate + (self.network.ring(vectors, devices) if devices > 1 else 0.0)

    def planner(self, ranks: int, exchange: partial[float] | None = None) -> StepPlanner:
        """Planner of steps on `ranks` devices; without `exchange` they are in one node and have no latency."""
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
    """The settings of the fastest step on one device; None: it does not fit."""
    return case.planner(1).fastest(_split, _counts(), (0,))


@cache
def _system() -> LLMSRecConfig:
    system = load_config(PRESET, ["system.llm.dtype=bfloat16"]).system
    assert isinstance(system, LLMSRecConfig)
    return system


def _counts() -> set[int]:
    """Numbers of micro-batches to try."""
    return {math.ceil(USERS / users) for users in range(1, USERS + 1)}


def _split(micro_batches: int) -> list[list[Load]]:
    """A step in equal micro-batches; that each would recompute its shared prefixes is neglected."""
    part = Load(**{field.name: math.ceil(getattr(_STEP, field.name) / micro_batches) for field in fields(Load)})
    return [[part] * micro_batches]


def tables() -> str:
    """All tables, as Markdown."""
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


def _table(head: Sequence[str], text_columns: int, rows: Sequence[Sequence[str]]) -> str:
    """Markdown table whose first `text_columns` columns are text, the others numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
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
    # Differences below half a percent are within the error of these estimates.
    return ", ".join(way.name for way, seconds in fitting.items() if best and seconds <= 1.005 * best) or "none fits"


def page_with(text: str, new: str) -> str:
    """The page `text` with its tables replaced by `new`."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + new + "\n\n" + END + rest.partition(END)[2]


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(prog="benchmarks.cluster.scaling", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help=f"write the tables into {PAGE.name} instead of printing them"
    )
    if parser.parse_args().write:
        PAGE.write_text(page_with(PAGE.read_text(), tables()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
