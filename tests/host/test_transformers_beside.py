"""What holds beside other nodes on transformers: each law for each of them, on each of its families."""

from __future__ import annotations

import functools

import pytest
import torch
from p2p.tests.host.beside import OF_TRANSFORMERS, Beside, Neighbour, by_paired_sampler, transformers, without
from p2p.tests.host.beside.transformers import Tiny
from p2p.tests.host.runs import EMPTY, HOST_WARNINGS, SOURCE, assert_close, difference
from p2p.tests.host.transformers import KNOWN

assert transformers  # it lists the neighbours
pytestmark = HOST_WARNINGS

DIFFERENT = 1e-3
"""What differs by more than this fraction of the largest value was changed."""


@pytest.fixture(scope="module")
def beside_of():
    """The runs of each family."""
    made = functools.cache(lambda family: Beside(Tiny(family)))
    yield made
    made.cache_clear()


@pytest.fixture
def beside(beside_of, family):
    return beside_of(family)


def beside_each(law: str | None = None) -> pytest.MarkDecorator:
    """Every neighbour that a law is said to hold with, on each of its families."""
    cases = [
        pytest.param(family, neighbour, id=f"{name}, {family}")
        for name, neighbour in OF_TRANSFORMERS.items()
        if law is None or law in neighbour.entry.holds
        for family in neighbour.families
        if family in KNOWN
    ]
    return pytest.mark.parametrize(("family", "neighbour"), cases)


@beside_each("same prompt")
def test_law_1_equal_prompts_give_equal_images(beside, neighbour: Neighbour):
    source, target = beside.paired(neighbour, (SOURCE,), neighbour.tau)
    assert_close(target, source, neighbour.tolerance)


@beside_each("tau empty")
def test_law_2_tau_empty_gives_plain_runs(beside, neighbour: Neighbour):
    source, target = beside.paired(neighbour, (neighbour.target,), EMPTY)
    assert_close(source, beside.plain(neighbour, SOURCE), neighbour.tolerance)
    assert_close(target, beside.plain(neighbour, neighbour.target), neighbour.tolerance)


@beside_each("source")
def test_law_3_the_source_never_changes(beside, neighbour: Neighbour):
    source, _ = beside.paired(neighbour, (neighbour.target,), EMPTY)
    again, _ = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert torch.equal(again, source)


@beside_each()
def test_the_edit_still_acts(beside, neighbour: Neighbour):
    _, target = beside.paired(neighbour, (neighbour.target,), EMPTY)
    _, edited = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert difference(edited, target) > DIFFERENT


@beside_each("acts")
def test_the_other_node_still_acts(beside, neighbour: Neighbour):
    found, expected = beside.plain(neighbour, SOURCE), without(beside.studio, neighbour, SOURCE)
    assert difference(found, expected) > DIFFERENT


@beside_each("order")
def test_the_order_of_nodes_does_not_matter(beside, neighbour: Neighbour):
    before, after = (
        beside.paired(neighbour, (neighbour.target,), neighbour.tau, order) for order in ("before", "after")
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@beside_each("Paired Sampler")
def test_the_paired_sampler_gives_the_same_pair(beside, neighbour: Neighbour):
    edit = beside.studio.edit(SOURCE, neighbour.target)
    found = by_paired_sampler(beside.studio, neighbour, edit, neighbour.tau)
    expected = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
