"""The weak-scaling tables: the committed page is up to date, and the formulas match values by hand."""

from __future__ import annotations

import pytest

from benchmarks.cluster.scaling import CLUSTERS, PAGE, SIZES, WAYS, Case, Link, Network, Way, page_with, tables
from trainer.planner.traffic import Rings

SLOW = Network("slow", inside=Link(rate=100.0, hop=1.0), between=Link(rate=10.0, hop=5.0))
BASE = 8.4e-6


def test_the_page_has_the_tables_of_the_script() -> None:
    page = PAGE.read_text()
    assert page_with(page, tables()) == page, "run `python -m benchmarks.cluster.scaling --write`"


def test_collectives_by_hand() -> None:
    rings = Rings(whole=800, calls=3)
    # One node: seven hops, seven eighths of the bytes.
    assert SLOW.ring(rings, 8) == pytest.approx(3 * (BASE + 7) + 700 / 100)
    assert SLOW.hierarchical(rings, 8) == SLOW.ring(rings, 8)
    # Four nodes: 28 hops inside and 3 between, all-reduces twice; the slowest link limits the ring.
    assert SLOW.ring(rings, 32, turns=2) == pytest.approx(3 * (BASE + 2 * (28 + 15)) + 2 * 775 / 10)
    inside, between = 3 * (BASE + 2 * 7) + 2 * 700 / 100, 3 * (BASE + 2 * 15) + 2 * 600 / 10
    assert SLOW.hierarchical(rings, 32, turns=2) == pytest.approx(inside + between)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_efficiency_falls_with_the_number_of_devices(way: Way) -> None:
    for kind, network in CLUSTERS:
        case = Case("Llama-3.2-3B", kind, network)
        found = [case.efficiency(option) for devices in SIZES if (option := case.option(way, devices))]
        assert len(found) == len(SIZES)
        assert found[0] < 1
        assert found == sorted(found, reverse=True)


def test_within_one_node_the_zero_3_sharding_group_does_not_matter() -> None:
    in_node, over_all = (way for way in WAYS if way.stage == 3)
    case = Case("Llama-3.2-3B", *CLUSTERS[0])
    assert case.option(in_node, 8) == case.option(over_all, 8)
    wide = [case.option(way, 256) for way in (in_node, over_all)]
    assert wide[0]
    assert wide[1]
    assert wide[0].step_seconds < wide[1].step_seconds
