"""A sweep: the same target at several values, as targets of one edit."""

from __future__ import annotations

import pytest
import torch
from p2p.attention.prompt import WordNotFound
from p2p.attention.schedule import TauSchedule, Window
from p2p.attention.sweep import sweep
from p2p.tests.unit.test_inject import make_edit

TAU = TauSchedule(Window(0.2, 0.8), Window(0.1, 0.4), fade=0.1, self_resolution=0.25)


def test_cross_end_goes_from_the_windows_start_to_the_end_of_the_run():
    edit, labels = sweep(make_edit("a cat", "a dog"), TAU, 5, "cross_end")
    assert [target.tau.cross for target in edit.targets] == [
        Window(0.2, end) for end in (0.2, 0.4, 0.6000000000000001, 0.8, 1.0)
    ]
    assert {(t.tau.self_, t.tau.fade, t.tau.self_resolution) for t in edit.targets} == {
        (Window(0.1, 0.4), 0.1, 0.25)
    }
    assert labels == ["cross_end 0.2", "cross_end 0.4", "cross_end 0.6", "cross_end 0.8", "cross_end 1"]


def test_self_end_leaves_the_cross_window_alone():
    edit, labels = sweep(make_edit("a cat", "a dog"), TAU, 2, "self_end")
    assert [target.tau.self_ for target in edit.targets] == [Window(0.1, 0.1), Window(0.1, 1.0)]
    assert {target.tau.cross for target in edit.targets} == {Window(0.2, 0.8)}
    assert labels == ["self_end 0.1", "self_end 1"]


@pytest.mark.parametrize(
    ("words", "gains", "tokens"),
    [
        ("mat", [], [5]),
        ("mat, on a", [], [3, 4, 5]),
        ("", [("on", 0.5)], [3]),
        ("mat", [("on", 0.5)], [5]),
        ("", [], [2]),
    ],
)
def test_scale_goes_from_minus_two_to_two_for_the_words_that_are_meant(words, gains, tokens):
    before = make_edit("a cat on a mat", "a dog on a mat", gains=gains)
    edit, labels = sweep(before, TAU, 5, "scale", words)
    assert labels == ["scale -2", "scale -1", "scale 0", "scale 1", "scale 2"]
    for target, scale in zip(edit.targets, (-2, -1, 0, 1, 2), strict=True):
        assert target.tau == TAU
        expected = before.targets[0].gain.clone()
        expected[tokens] = scale
        assert torch.equal(target.gain, expected)
    assert torch.equal(before.targets[0].gain[[0, 1]], torch.ones(2))  # the given edit is untouched


@pytest.mark.parametrize(
    ("targets", "arguments", "error", "message"),
    [
        (["a dog", "a hat"], (3, "cross_end"), ValueError, "but the edit has 2; give it"),
        (["a dog"], (1, "cross_end"), ValueError, "count is 1; expected 2 to 16"),
        (["a dog"], (17, "cross_end"), ValueError, "count is 17"),
        (["a dog"], (3, "fade"), ValueError, "parameter is 'fade'; expected one of cross_end, self_end"),
        (["a dog"], (3, "self_end", "dog"), ValueError, "self_end has no use for 'dog'"),
        (["a dog"], (3, "scale", "zebra"), WordNotFound, "Its words are: a, dog"),
        (["a dog"], (3, "scale", "cat"), WordNotFound, "The source has it"),
        (["a cat"], (3, "scale"), ValueError, "every word of the target is also in the source"),
    ],
)
def test_what_cannot_be_swept_is_an_error(targets, arguments, error, message):
    with pytest.raises(error) as raised:
        sweep(make_edit("a cat", *targets), TAU, *arguments)
    assert message in str(raised.value)
