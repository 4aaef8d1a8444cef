"""Words' maps of transformers, and what is made of them: equal to those of materialised maps, and free."""

from __future__ import annotations

import functools

import pytest
import torch
from p2p.sampling.maps import MapsHandle
from p2p.tests.host.test_transformers_laws import PART, pair_of
from p2p.tests.host.transformers import TINY, build

every_family = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def model_of():
    """Each family's MODEL, made once for this module."""
    made = functools.cache(build)
    yield made
    made.cache_clear()


@every_family
def test_maps_change_nothing_of_the_run(name, model_of):
    pair, handle = pair_of(name, model_of(name)), MapsHandle(wanted=True)
    assert torch.equal(pair.run(PART, 4.0, maps=handle), pair.run(PART, 4.0))
    maps = handle.maps_of(torch.ones(1))
    for branch in range(pair.branches):
        labels, phrases = maps.phrases(branch, "")
        found = maps.of(branch, phrases, 0, 0.0, 1.0)
        assert (found.flatten(2).sum(-1) > 0).all() and (found.sum(1) < 1).all()
