"""tau: which steps of a run a window covers, and which step a model call belongs to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from p2p.attention.edit import Edit, Source
from p2p.attention.plan import check_words, cross_weights
from p2p.attention.prompt import WordNotFound
from p2p.attention.schedule import TauSchedule, Window, in_steps, parse_word_windows, place_of, step_of
from p2p.tests.prompts import prompt_of

hundredths = st.integers(0, 100).map(lambda n: n / 100)
"""What the node's widgets can hold."""


def edit_to(*targets):
    edit = Edit(Source(prompt_of("a cat on a mat")))
    for target in targets:
        edit = edit.with_target(prompt_of(target), "auto")
    return edit


def steps_of(window, steps, fade=0.0):
    return [window.weight(step / steps, fade) for step in range(steps)]


@pytest.mark.parametrize(
    ("start", "end", "steps", "first", "count"),
    [
        (0, 0.8, 20, 0, 16),
        (0, 0.4, 20, 0, 8),
        (0, 1, 20, 0, 20),
        (0, 0, 20, 0, 0),
        (0.2, 0.8, 10, 2, 6),
        (0.5, 0.5, 20, 0, 0),
        (0, 0.01, 20, 0, 1),
        (0, 0.3, 10, 0, 3),
        (0, 0.7, 10, 0, 7),
        (0, 0.1, 30, 0, 3),
        (0, 0.8, 1, 0, 1),
        (0.34, 0.67, 3, 2, 1),
        (0, 0.8, 50, 0, 40),
    ],
)
def test_a_window_covers_the_steps_with_start_le_progress_lt_end(start, end, steps, first, count):
    weights = steps_of(Window(start, end), steps)
    assert weights == [1.0 if first <= step < first + count else 0.0 for step in range(steps)]


@given(hundredths, st.integers(1, 100))
def test_a_window_from_zero_covers_the_smallest_number_of_steps_that_reaches_its_end(end, steps):
    assert sum(steps_of(Window(0, end), steps)) == math.ceil(round(end * 100) * steps / 100)


@given(hundredths, st.integers(1, 60))
def test_windows_that_meet_cover_the_run_once(border, steps):
    """alpha tables of the published code have steps+1 rows and two rounding rules; here is one."""
    before, after = Window(0, border), Window(border, 1)
    assert [a + b for a, b in zip(steps_of(before, steps), steps_of(after, steps), strict=True)] == [
        1.0
    ] * steps


@given(hundredths, hundredths, hundredths, st.integers(1, 60))
def test_a_faded_weight_lies_between_nothing_and_the_hard_window(start, end, fade, steps):
    assume(start <= end)
    window = Window(start, end)
    for faded, hard in zip(steps_of(window, steps, fade), steps_of(window, steps), strict=True):
        assert 0.0 <= faded <= hard


@pytest.mark.parametrize(
    ("window", "fade", "progress", "weight"),
    [
        (Window(0, 0.8), 0.4, 0.0, 1.0),  # no edge at the run's own start
        (Window(0, 0.8), 0.4, 0.4, 1.0),
        (Window(0, 0.8), 0.4, 0.5, 0.75),
        (Window(0, 0.8), 0.4, 0.6, 0.5),
        (Window(0, 0.8), 0.4, 0.8, 0.0),
        (Window(0.2, 1), 0.4, 0.2, 0.0),
        (Window(0.2, 1), 0.4, 0.3, 0.25),
        (Window(0.2, 1), 0.4, 0.6, 1.0),
        (Window(0.2, 1), 0.4, 0.95, 1.0),  # nor at its end
        (Window(0.2, 0.6), 0.4, 0.4, 0.5),
        (Window(0, 1), 1.0, 0.5, 1.0),
        (Window(0, 0.5), 1.0, 0.0, 0.5),
    ],
)
def test_a_fade_is_a_straight_line_at_the_inner_edges(window, fade, progress, weight):
    assert window.weight(progress, fade) == pytest.approx(weight)


@pytest.mark.parametrize(("start", "end"), [(-0.1, 0.5), (0, 1.1), (0.6, 0.5), (math.nan, 1), (0, math.nan)])
def test_a_window_outside_the_run_or_backwards_is_refused(start, end):
    with pytest.raises(ValueError, match="tau window"):
        Window(start, end)


@pytest.mark.parametrize(
    "options", [{"fade": -0.1}, {"fade": 1.5}, {"self_resolution": 2.0}, {"self_resolution": -1.0}]
)
def test_numbers_of_the_schedule_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TauSchedule(**options)


# Words


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("", ()),
        ("\n  \n", ()),
        ("hat: 0.3", (("hat", Window(0, 0.3)),)),
        ("hat: 0.2-0.6", (("hat", Window(0.2, 0.6)),)),
        ("hat:0.2 - 0.6", (("hat", Window(0.2, 0.6)),)),
        ("red hair: .1-.6\ncat#2: 1", (("red hair", Window(0.1, 0.6)), ("cat#2", Window(0, 1)))),
        ("hat: 0", (("hat", Window(0, 0)),)),
        ("3:00: 0.5", (("3:00", Window(0, 0.5)),)),
        ("hat: 0.3,", (("hat", Window(0, 0.3)),)),
        ("hat: 0.3,\ndog: 0.5 ,", (("hat", Window(0, 0.3)), ("dog", Window(0, 0.5)))),
        ("dog:0.3, a: 0.5", (("dog", Window(0, 0.3)), ("a", Window(0, 0.5)))),
        (
            "dog: .1 - .3,red hat:1, cat#2: 0.2",
            (
                ("dog", Window(0.1, 0.3)),
                ("red hat", Window(0, 1)),
                ("cat#2", Window(0, 0.2)),
            ),
        ),
        ("red, white and blue: 0.3", (("red, white and blue", Window(0, 0.3)),)),
    ],
)
def test_windows_of_words_are_read_line_by_line(text, windows):
    assert parse_word_windows(text) == windows


@pytest.mark.parametrize(
    "line",
    [
        "hat",
        "hat 0.3",
        ": 0.3",
        "hat:",
        "hat: x",
        "hat: 0.2-",
        "hat: -0.2",
        "hat: 0.1-0.2-0.3",
        "hat: 0,3",
        "hat: 30%",
        "hat: 0.3, dog",
        "hat: 0.3,,",
    ],
)
def test_a_line_that_cannot_be_read_is_quoted(line):
    with pytest.raises(ValueError) as error:
        parse_word_windows(f"dog: 0.5\n{line}")
    assert f'"{line}"' in str(error.value)
    assert "fractions of the run from 0 to 1" in str(error.value)


@pytest.mark.parametrize("filling", [*"1.-: \t,()\"\u0661", "1.", "0-", ": 0", "a "])
def test_long_lines_are_read_in_linear_time(filling):
    """Whoever tries every place where a number or a gap could end needs minutes for one of these."""
    filling = filling * (200_000 // len(filling))
    assert parse_word_windows(f"a{filling}b: 0.5") == ((f"a{filling}b", Window(0, 0.5)),)
    with pytest.raises(ValueError, match="Cannot read the line"):
        parse_word_windows(f"a: {filling}x")


def test_many_windows_are_read_in_linear_time():
    line = ", ".join(["hat: 0.25-0.5"] * 20_000)
    assert parse_word_windows(line) == (("hat", Window(0.25, 0.5)),) * 20_000
    assert parse_word_windows("hat: 0." + "1" * 200_000) == (("hat", Window(0, 1 / 9)),)
    with pytest.raises(ValueError, match="expected a fraction of the run"):
        parse_word_windows("hat: " + "1" * 200_000)


@pytest.mark.parametrize("line", ["hat: 1.5", "hat: 0.6-0.2", "hat: 3"])
def test_a_window_out_of_range_is_quoted_with_its_line(line):
    with pytest.raises(ValueError, match="tau window") as error:
        parse_word_windows(line)
    assert line in str(error.value)


def test_a_words_own_window_stands_in_for_the_general_one():
    (target,) = edit_to("a big cat on a mat").targets
    tau = TauSchedule(cross=Window(0, 0.8), words=(("big", Window(0, 0.2)), ("mat", Window(0.5, 1))))
    big, mat = list(target.prompt.find("big")), list(target.prompt.find("mat"))
    rest = [token for token in range(target.prompt.length) if token not in big + mat]
    for progress, weights in ((0.0, (1, 1, 0)), (0.3, (1, 0, 0)), (0.6, (1, 0, 1)), (0.9, (0, 0, 1))):
        found = cross_weights(target, tau, progress)
        assert (found[rest] == weights[0]).all()
        assert (found[big] == weights[1]).all()
        assert (found[mat] == weights[2]).all()


def test_a_window_of_a_word_holds_for_all_of_its_places_or_the_numbered_one():
    (target,) = edit_to("cat and cat").targets
    for word, tokens in (("cat", [1, 3]), ("cat#2", [3])):
        tau = TauSchedule(cross=Window(0, 0), words=((word, Window(0, 1)),))
        weights = cross_weights(target, tau, 0.5)
        assert weights.nonzero().flatten().tolist() == tokens


def test_words_fade_like_the_rest():
    (target,) = edit_to("a dog on a mat").targets
    tau = TauSchedule(cross=Window(0, 1), fade=0.4, words=(("dog", Window(0, 0.8)),))
    weights = cross_weights(target, tau, 0.6)
    assert weights[target.prompt.find("dog")[0]] == pytest.approx(0.5)
    assert weights[target.prompt.find("mat")[0]] == 1.0


def test_a_word_may_stand_in_one_of_several_targets():
    edit = edit_to("a dog on a mat", "a bird on a mat")
    tau = TauSchedule(words=(("bird", Window(0, 0)),))
    check_words(edit, tau)
    assert (cross_weights(edit.targets[0], tau, 0.0) == 1).all()
    assert cross_weights(edit.targets[1], tau, 0.0)[edit.targets[1].prompt.find("bird")[0]] == 0


def test_a_word_that_no_target_has_is_an_error_that_lists_the_words():
    with pytest.raises(WordNotFound, match='^words: "zebra" .* a, dog, on, mat'):
        check_words(edit_to("a dog on a mat"), TauSchedule(words=(("zebra", Window(0, 0)),)))


def test_self_attention_has_its_own_window():
    tau = TauSchedule(cross=Window(0, 1), self_=Window(0.2, 0.5))
    assert [tau.self_weight(step / 10) for step in range(10)] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]


# Which step a model call belongs to


KARRAS = [14.6, 9.2, 5.5, 3.1, 1.6, 0.8, 0.3, 0.1, 0.03, 0.0]


@pytest.mark.parametrize("step", range(9))
def test_a_call_at_an_entry_of_the_list_is_that_step(step):
    assert step_of(KARRAS[step], KARRAS) == step


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_call_between_two_entries_belongs_to_the_step_that_it_is_part_of(step, fraction):
    """dpm_2, dpmpp_sde, seeds and others call the model in between."""
    assert step_of(KARRAS[step] ** (1 - fraction) * KARRAS[step + 1] ** fraction, KARRAS) == step


def test_calls_below_the_last_entry_belong_to_the_last_step():
    assert step_of(0.001, KARRAS) == 8
    assert step_of(0.0, KARRAS) == 8


def test_calls_above_the_first_entry_belong_to_the_first_step():
    assert step_of(20.0, KARRAS) == 0


@given(st.integers(0, 8), st.floats(-3e-5, 3e-5))
def test_float_noise_does_not_change_the_step(step, noise):
    assert step_of(float(torch.tensor(KARRAS[step] * (1 + noise), dtype=torch.float32)), KARRAS) == step


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=30, unique=True),
    st.floats(0.001, 200),
    st.floats(0.001, 200),
)
def test_steps_never_go_back_while_sigma_falls(sigmas, high, low):
    sigmas = [*sorted(sigmas, reverse=True), 0.0]
    high, low = max(high, low), min(high, low)
    assert 0 <= step_of(high, sigmas) <= step_of(low, sigmas) <= len(sigmas) - 2


def test_a_part_of_a_run_counts_its_own_steps():
    """KSamplerAdvanced from step 3 to 6: progress is the place in the list that the sampler was given."""
    part = KARRAS[3:7]
    assert [step_of(sigma, part) for sigma in part[:-1]] == [0, 1, 2]


def test_a_call_where_noise_is_left_is_at_the_end_of_the_run():
    """The second call of the last step of heun."""
    assert place_of(0.3, KARRAS[:7]) == 6 and place_of(0.0, KARRAS) == 8
    assert in_steps(4)("steps") == [0.0, 0.25, 0.5, 0.75, 0.75]


def test_a_list_that_does_not_end_at_zero_has_its_last_step_before_the_last_entry():
    assert step_of(0.3, KARRAS[:7]) == 5


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.0]])
def test_a_run_of_one_step_has_step_zero(sigmas):
    assert step_of(1.0, sigmas) == 0


def test_mistake_of_counting_calls_the_step_does_not_depend_on_what_was_asked_before():
    calls = [14.6, 9.2, 9.2, 5.5, 5.5, 3.1]  # heun: two calls per step
    assert [step_of(sigma, KARRAS) for sigma in calls] == [0, 1, 1, 2, 2, 3]
    assert [step_of(sigma, KARRAS) for sigma in reversed(calls)] == [3, 2, 2, 1, 1, 0]
