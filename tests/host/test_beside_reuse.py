"""What saves work or memory beside other nodes: a kept source and groups of targets change no result."""

from __future__ import annotations

from dataclasses import replace

import pytest
from p2p.attention.edit import Edit
from p2p.nodes import AttentionController
from p2p.tests.host.beside import NEIGHBOURS, Neighbour, graphs, latent_of, models, sample
from p2p.tests.host.runs import HOST_WARNINGS, SOURCE, TARGET, Settings, Studio, assert_close
from torch import Tensor

assert graphs and models  # they list the neighbours
pytestmark = HOST_WARNINGS

FIRST = "a dog riding a bicycle"
CASES = [
    pytest.param(
        replace(n, settings=Settings(steps=2)) if n.settings == Settings(steps=3) and not n.sample else n,
        id=name,
    )
    for name, n in NEIGHBOURS.items()
]


pytestmark = pytest.mark.usefixtures("nothing_kept")


class Graphs:
    """Each neighbour's model, which every run shares as in a graph, and its run in one batch, made once."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.edit = studio.edit(SOURCE, FIRST, TARGET)
        self._models: dict = {}
        self._whole: dict = {}

    def run(self, n: Neighbour, edit: Edit | None = None, reuse: float = 0.0) -> tuple[Tensor, Tensor]:
        """(sources, targets) of the two targets or of another edit. reuse: GB."""
        if n.name not in self._models:
            self._models[n.name] = n.model(self.studio, self.studio.model) if n.model else self.studio.model
        model, edit = self._models[n.name], edit or self.edit
        model, positive = AttentionController.execute(model, edit, n.tau, reuse_gb=reuse).args[:2]
        rows = self.studio.rows(edit, latent_of(self.studio, n))
        return self.studio.split(edit, sample(self.studio, n, model, positive, rows))

    def whole(self, n: Neighbour) -> tuple[Tensor, Tensor]:
        if n.name not in self._whole:
            self._whole[n.name] = self.run(n)
        return self._whole[n.name]


@pytest.fixture(scope="module")
def made(studio):
    return Graphs(studio)


@pytest.mark.parametrize("neighbour", CASES)
def test_a_kept_source_gives_the_same_result(studio, made, neighbour: Neighbour):
    made.run(neighbour, studio.edit(SOURCE, FIRST), reuse=1.0)
    for found, expected in zip(made.run(neighbour, reuse=1.0), made.whole(neighbour), strict=True):
        assert_close(found, expected, neighbour.tolerance)


@pytest.mark.parametrize("neighbour", CASES)
def test_groups_of_targets_give_the_same_result(made, monkeypatch, neighbour: Neighbour):
    whole = made.whole(neighbour)
    monkeypatch.setattr("p2p.sampling.hooks.fitting_groups", lambda *_: ((0,), (1,)))
    for found, expected in zip(made.run(neighbour), whole, strict=True):
        assert_close(found, expected, neighbour.tolerance)
