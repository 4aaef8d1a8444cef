"""The tau Sweep node: each target of the one run equals a run of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import AddTarget, ComparisonGrid
from p2p.nodes.sweep import TauSweep
from p2p.tests.host.runs import EDITED, assert_close, difference

TAU = TauSchedule(Window(0, 0.8), Window(0, 0.5), self_resolution=1.0)
SOURCE, TARGET = "a cat riding a bicycle", "a dog riding a red car"


@pytest.mark.parametrize(("way", "fade"), [("KSampler", 0.4), ("P2PSampler", 0.0)])
@pytest.mark.parametrize("parameter", ["cross_end", "self_end", "scale"])
def test_every_value_of_a_sweep_equals_its_own_run(studio, way, parameter, fade):
    edit, tau = studio.edit(SOURCE, TARGET), replace(TAU, fade=fade)
    swept, labels = TauSweep.execute(edit, tau, 5, parameter, "red" if parameter == "scale" else "").args
    assert len(labels.splitlines()) == len(swept.targets) == 5
    sources, targets = studio.paired(swept, TauSchedule(Window(0.5, 0.6), Window(0, 0)), way=way)
    own = []
    for n, value in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        if parameter == "cross_end":
            one = (edit, replace(tau, cross=Window(0, value)))
        elif parameter == "self_end":
            one = (edit, replace(tau, self_=Window(0, value)))
        else:
            one = (edit.reweighted("red", -2 + 4 * value), tau)
        source, target = studio.paired(*one, way=way)
        assert_close(targets[n : n + 1], target)
        assert_close(sources, source)
        own.append(target)
    assert difference(own[0], own[-1]) > EDITED


def test_a_target_added_after_the_sweep_follows_the_runs_own_schedule(studio):
    edit = studio.edit(SOURCE, TARGET)
    swept = TauSweep.execute(edit, TAU, 2, "cross_end").args[0]
    more = AddTarget.execute(studio.clip, swept, "a cat riding a boat", "auto").args[0]
    other = TauSchedule(Window(0, 0.5), Window(0, 0))
    _, targets = studio.paired(more, other)
    assert_close(targets[2:], studio.paired(studio.edit(SOURCE, "a cat riding a boat"), other)[1])


def test_the_labels_fit_the_comparison_grid(studio):
    labels = TauSweep.execute(studio.edit(), TAU, 4, "self_end").args[1]
    grid = ComparisonGrid.execute(torch.zeros(4, 32, 64, 3), 4, labels).args[0]
    assert grid.shape[1] > 40


def test_an_unknown_parameter_is_refused(studio):
    with pytest.raises(ValueError, match="parameter is 'tau'; expected one of cross_end, self_end, scale"):
        TauSweep.execute(studio.edit(), TAU, 4, "tau")


def test_an_edit_of_several_targets_and_a_word_of_tau_are_errors_that_say_where_to_change_them(studio):
    with pytest.raises(ValueError, match="the edit has 2; connect the edit from before Add Target"):
        TauSweep.execute(studio.edit(SOURCE, "a dog", "a hat"), TAU, 4, "cross_end")
    with pytest.raises(ValueError, match='^tau Scheduler, words: "zebra" is not in the prompt'):
        TauSweep.execute(studio.edit(), TauSchedule(words=(("zebra", Window(0, 1)),)), 4, "cross_end")
