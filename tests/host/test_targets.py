"""Several targets in one run: each is what it would be alone, and the source is one."""

from __future__ import annotations

import pytest
import torch
from p2p.attention.schedule import parse_word_windows
from p2p.nodes import AddTarget
from p2p.tests.host.runs import PART, SOURCE, WAYS, Settings, TauSchedule, assert_close, empty

TARGETS = [
    "a cat riding a red car",
    "a penguin riding a bicycle on a beach",
    "watercolor of a cat riding a bicycle",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2s_ancestral"])
def test_each_of_several_targets_is_what_it_is_in_a_run_of_its_own(studio, sampler, way):
    settings = Settings(sampler=sampler)
    sources, targets = studio.paired(studio.edit(SOURCE, *TARGETS), PART, settings, empty(2), way)
    for n, text in enumerate(TARGETS):
        source, target = studio.paired(studio.edit(SOURCE, text), PART, settings, empty(2), way)
        assert_close(sources, source)
        assert_close(targets[n :: len(TARGETS)], target)


def test_a_word_with_its_own_window_counts_in_the_targets_that_have_it(studio):
    tau = TauSchedule(words=parse_word_windows("beach: 0.2"))
    _, targets = studio.paired(studio.edit(SOURCE, *TARGETS), tau)
    for n, text in enumerate(TARGETS):
        own = tau if "beach" in text else TauSchedule()
        assert_close(targets[n], studio.paired(studio.edit(SOURCE, text), own)[1][0])


def test_a_word_is_reweighted_in_all_targets_that_have_it_or_in_the_one_that_is_asked_for(studio):
    edit = studio.edit(SOURCE, *TARGETS)
    everywhere, third = edit.reweighted("bicycle", 0.5), edit.reweighted("bicycle", 0.5, target=3)
    assert [bool((target.gain != 1).any()) for target in everywhere.targets] == [False, True, True]
    assert [bool((target.gain != 1).any()) for target in third.targets] == [False, False, True]
    with pytest.raises(ValueError, match="target is 4, but the edit has 3"):
        edit.reweighted("bicycle", 0.5, target=4)


def test_add_target_leaves_the_edit_that_it_was_given_as_it_was(studio):
    edit = studio.edit()
    before = edit.targets
    extended = AddTarget.execute(studio.clip, edit, TARGETS[1], "auto").args[0]
    assert edit.targets is before and extended.targets[0] is before[0]
    assert [target.text for target in extended.targets] == [before[0].text, TARGETS[1]]
    assert torch.equal(extended.targets[1].mapping, studio.edit(SOURCE, TARGETS[1]).targets[0].mapping)
