"""What holds beside other nodes: each law for each of them, in every place where the node can stand."""

from __future__ import annotations

import pytest
import torch
from p2p.tests.host.beside import (
    NEIGHBOURS,
    Beside,
    Neighbour,
    by_paired_sampler,
    equal_prompts_give_equal_images,
    graphs,
    models,
    tau_empty_gives_plain_runs,
    the_source_never_changes,
    without,
)
from p2p.tests.host.runs import EMPTY, HOST_WARNINGS, SOURCE, difference

assert graphs and models  # they list the neighbours
pytestmark = HOST_WARNINGS

DIFFERENT = 1e-3
"""What differs by more than this fraction of the largest value was changed."""


@pytest.fixture(scope="module")
def beside(studio):
    return Beside(studio)


def beside_each(law: str) -> pytest.MarkDecorator:
    """Every neighbour that a law is said to hold with."""
    cases = [
        pytest.param(neighbour, id=name)
        for name, neighbour in NEIGHBOURS.items()
        if law in neighbour.entry.holds
    ]
    return pytest.mark.parametrize("neighbour", cases)


@beside_each("same prompt")
def test_law_1_equal_prompts_give_equal_images(beside, neighbour: Neighbour):
    equal_prompts_give_equal_images(beside, neighbour)


@beside_each("tau empty")
def test_law_2_tau_empty_gives_plain_runs(beside, neighbour: Neighbour):
    tau_empty_gives_plain_runs(beside, neighbour)


@beside_each("source")
def test_law_3_the_source_never_changes(beside, neighbour: Neighbour):
    the_source_never_changes(beside, neighbour)


@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_the_edit_still_acts(beside, neighbour: Neighbour):
    _, target = beside.paired(neighbour, (neighbour.target,), EMPTY)
    _, edited = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert difference(edited, target) > DIFFERENT


@beside_each("acts")
def test_the_other_node_still_acts(studio, beside, neighbour: Neighbour):
    assert difference(beside.plain(neighbour, SOURCE), without(studio, neighbour, SOURCE)) > DIFFERENT


@beside_each("order")
def test_the_order_of_nodes_does_not_matter(beside, neighbour: Neighbour):
    before, after = (
        beside.paired(neighbour, (neighbour.target,), neighbour.tau, order) for order in ("before", "after")
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@beside_each("Paired Sampler")
def test_the_paired_sampler_gives_the_same_pair(studio, beside, neighbour: Neighbour):
    found = by_paired_sampler(studio, neighbour, studio.edit(SOURCE, neighbour.target), neighbour.tau)
    expected = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
