"""Alignment of words and its token matrix M: laws for any pair of prompts, and small examples."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from p2p.attention.alignment import MODES, Pairing, align, token_mapping
from p2p.attention.tags import is_comma, split_tags, tag_text
from p2p.tests.prompts import prompt_of, tokens_of

COMMON = ["a", "cat", "on", ",", "bi|cycle", "red", "'s", "e|le|phant"]
"""Few words, so that they repeat and meet in both prompts; of one, two and three tokens."""

texts = st.lists(st.sampled_from(COMMON), max_size=9).map(" ".join)
prose = st.lists(st.sampled_from([word for word in COMMON if word != ","]), max_size=9).map(" ".join)
modes = st.sampled_from(MODES)
windows = st.sampled_from([77, 5, 6])
"""Small windows make long prompts of short texts."""


def mapped(source, target, mode):
    alignment = align(source, target, mode)
    return (alignment, *token_mapping(source, target, alignment))


def words_in(prompt):
    return [word.text for word in prompt.words]


def most_in_common(left, right):
    """Length of the longest common subsequence, by trying everything."""

    @cache
    def best(i, j):
        if i == len(left) or j == len(right):
            return 0
        pair = 1 + best(i + 1, j + 1) if left[i] == right[j] else 0
        return max(pair, best(i + 1, j), best(i, j + 1))

    return best(0, 0)


def source_tokens(prompt, words):
    return [token for word in words for token in prompt.words[word].tokens]


# Any pair of prompts: words


@given(texts, modes, windows)
def test_identical_prompts_give_the_identity(text, mode, window):
    prompt = prompt_of(text, window)
    alignment, mapping, inherits = mapped(prompt, prompt, mode)
    assert torch.equal(mapping, torch.eye(prompt.length))
    assert torch.equal(inherits, torch.ones(prompt.length))
    assert not alignment.new and not alignment.removed


@given(texts, texts, modes)
def test_every_word_has_one_place_in_the_alignment(left, right, mode):
    source, target = prompt_of(left), prompt_of(right)
    alignment = align(source, target, mode)
    used = [word for pairing in alignment.pairings for word in pairing.source] + list(alignment.removed)
    made = [word for pairing in alignment.pairings for word in pairing.target] + list(alignment.new)
    assert sorted(used) == list(range(len(source.words)))
    assert sorted(made) == list(range(len(target.words)))


@given(prose, prose, modes)
def test_pairings_keep_the_order_of_both_prompts_where_there_are_no_tags(left, right, mode):
    alignment = align(prompt_of(left), prompt_of(right), mode)
    for side in ("source", "target"):
        places = [word for pairing in alignment.pairings for word in getattr(pairing, side)]
        assert places == sorted(places)


@given(texts, texts)
def test_swap_keeps_the_order_of_both_prompts(left, right):
    alignment = align(prompt_of(left), prompt_of(right), "swap")
    for side in ("source", "target"):
        places = [word for pairing in alignment.pairings for word in getattr(pairing, side)]
        assert places == sorted(places)


@given(texts, texts, modes)
def test_shared_words_are_equal_words_and_as_many_as_there_can_be_in_order(left, right, mode):
    source, target = prompt_of(left), prompt_of(right)
    shared = [pairing for pairing in align(source, target, mode).pairings if not pairing.swapped]
    for pairing in shared:
        ((i,), (j,)) = pairing.source, pairing.target
        assert source.words[i].text == target.words[j].text
    words = [[word for word in words_in(prompt) if word != ","] for prompt in (source, target)]
    most = most_in_common(*map(tuple, words))
    found = sum(target.words[pairing.target[0]].text != "," for pairing in shared)
    assert found == most if mode == "swap" or "," not in left + right else found >= most


@given(texts, texts)
def test_refine_swaps_nothing(left, right):
    assert not any(pairing.swapped for pairing in align(prompt_of(left), prompt_of(right), "refine").pairings)


@given(prose, prose, st.sampled_from(["auto", "swap"]))
def test_a_run_that_faces_a_run_is_swapped_and_one_that_faces_nothing_is_new_or_removed(left, right, mode):
    source, target = prompt_of(left), prompt_of(right)
    alignment = align(source, target, mode)
    shared = [(p.source[0], p.target[0]) for p in alignment.pairings if not p.swapped]
    borders = [(-1, -1), *shared, (len(source.words), len(target.words))]
    for (i0, j0), (i1, j1) in zip(borders, borders[1:], strict=False):
        facing = i1 - i0 > 1 and j1 - j0 > 1
        assert set(range(i0 + 1, i1)) <= set(alignment.removed) or facing
        assert set(range(j0 + 1, j1)) <= set(alignment.new) or facing
        if facing:
            assert not set(range(i0 + 1, i1)) & set(alignment.removed)
            assert not set(range(j0 + 1, j1)) & set(alignment.new)


def test_the_fewest_runs_are_matched_where_there_is_a_choice():
    assert describe("a cat", "a dog and a cat") == ([], ["a", "dog", "and"], [])
    assert describe("a dog and a cat", "a cat") == ([], [], ["a", "dog", "and"])
    assert describe("long hair , hat", "long sleeves , long hair", "swap")[1] == ["long", "sleeves", ","]


# Tags: what stands between commas


TAGS = ["red hair", "blue eyes", "1 girl", "smile", "very long sleeves", "hat", "bi|cycle ride"]


@st.composite
def shuffled_tags(draw):
    """Tags of different words, and some of them again in any order, with new and edited ones among them."""
    source = draw(st.lists(st.sampled_from(TAGS), unique=True, max_size=6))
    kept = draw(st.permutations(source))[: draw(st.integers(0, len(source)))]
    edited = [f"{tag} x{n}" for n, tag in enumerate(source) if tag not in kept and draw(st.booleans())]
    added = [f"new{n}" for n in range(draw(st.integers(0, 2)))]
    return source, draw(st.permutations(kept + edited + added)), kept


def joined(tags):
    return " , ".join(tags)


@given(shuffled_tags(), st.sampled_from(["auto", "refine"]))
def test_a_tag_of_both_prompts_is_shared_wherever_it_moved(tags, mode):
    left, right, kept = tags
    source, target = prompt_of(joined(left)), prompt_of(joined(right))
    alignment = align(source, target, mode)
    shared = {(p.source[0], p.target[0]) for p in alignment.pairings if not p.swapped}
    here = dict(zip(left, split_tags(source), strict=True))
    there = dict(zip(right, split_tags(target), strict=True))
    for tag in kept:
        assert set(zip(here[tag], there[tag], strict=True)) <= shared


@given(shuffled_tags(), modes)
def test_no_comma_is_lost_where_tags_only_changed_places(tags, mode):
    left, _, _ = tags
    source, target = prompt_of(joined(left)), prompt_of(joined(reversed(left)))
    alignment = align(source, target, mode)
    if mode != "swap":
        assert not alignment.new and not alignment.removed
    assert align(source, source, mode).pairings == tuple(
        Pairing((n,), (n,), False) for n in range(len(source.words))
    )


@pytest.mark.parametrize(
    ("source", "target", "swapped", "new", "removed"),
    [
        ("1 girl , red hair", "1 girl , blue hair , hat", [("red", "blue")], [",", "hat"], []),
        ("long red hair , hat", "long blue hair , hat", [("red", "blue")], [], []),
        ("red hair , blue eyes", "blue hair , red eyes", [("red", "blue"), ("blue", "red")], [], []),
        ("1 girl , smile , hat", "1 girl , hat", [], [], ["smile", ","]),
        ("1 girl , smile , hat", "1 girl , dress , smile", [], ["dress", ","], [",", "hat"]),
        ("1 girl , smile", "1 girl , hat , bow", [("smile", "hat")], [",", "bow"], []),
        ("1 girl , hat , bow", "1 girl , smile", [("hat", "smile")], [], [",", "bow"]),
        ("1 girl , smile , bow", "1 girl , very long hair , bow", [("smile", "very long hair")], [], []),
        ("hat , hat , bow", "hat , bow", [], [], ["hat", ","]),
        ("hat , bow", "bow , hat , bow", [], ["bow", ","], []),
        ("hat , bow , cat", "bow , cat , hat , hat", [], [",", "hat"], []),
        (", hat ,, ,", "hat", [], [], [",", ",,", ","]),
        ("hat", ", hat ,, bow", [], [",", ",,", "bow"], []),
        (",", ", ,", [], [","], []),
        ("a fluffy , grey cat", "a dog", [("fluffy , grey cat", "dog")], [], []),
        ("a cat on a mat", "a dog , on a mat", [("cat", "dog")], [","], []),
        ("a cat .", "a dog !", [("cat", "dog")], ["!"], ["."]),
    ],
)
def test_tags_in_auto(source, target, swapped, new, removed):
    assert describe(source, target) == (swapped, new, removed)


MOVED = [
    ("red hair , blue eyes , hat", "hat , red hair , blue eyes"),
    ("red hair , blue hair , green hair", "green hair , blue hair , red hair"),
    ("portrait of a woman , oil painting", "oil painting , portrait of a woman"),
    ("a cat , a dog", "a dog , a cat"),
    ("saber ( fate ), hat", "hat , saber ( fate"),
    ("\U0001f431 , hat", "hat , \U0001f431"),
    ("\u732b\uff0c hat", "hat , \u732b"),
]


@pytest.mark.parametrize(("source", "target"), MOVED)
@pytest.mark.parametrize("mode", ["auto", "refine"])
def test_tags_that_moved_are_shared_in_auto_and_refine(source, target, mode):
    source = source.replace("\uff0c", " \uff0c")
    assert describe(source, target, mode) == ([], [], [])


def test_tags_that_moved_are_swapped_by_position_in_swap():
    assert describe("a cat , a dog", "a dog , a cat", "swap") == ([("cat", "dog"), ("dog", "cat")], [], [])


def test_a_tag_that_moved_past_an_edited_one_is_shared_with_its_comma():
    source, target = "portrait of woman , oil painting", "oil painting , portrait of old woman"
    assert describe(source, target) == ([], ["old"], [])
    assert describe(source, target, "swap")[1] == ["oil", "painting", ",", "old"]


def test_without_commas_the_order_of_words_counts():
    """A hat that moved from the cat to the dog is a new hat; it must not look where the old one was."""
    found = describe("a cat in a hat and a big white dog", "a cat and a big white dog in a hat")
    assert found == ([], ["in", "a", "hat"], ["in", "a", "hat"])
    found = describe("a red car and a blue house", "a blue house and a red car")
    assert found == ([], ["and", "a", "red", "car"], ["a", "red", "car", "and"])
    for mode in ("auto", "swap"):
        assert describe("a cat and a dog", "a dog and a cat", mode)[0] == [("cat", "dog"), ("dog", "cat")]


def test_a_moved_tag_takes_the_map_of_its_own_tokens():
    source, target = prompt_of("hat , bi|cycle ride"), prompt_of("bi|cycle ride , hat")
    _, mapping, inherits = mapped(source, target, "auto")
    # source: 1 hat, 2 comma, 3-5 ride; target: 1-3 ride, 4 comma, 5 hat
    assert mapping[:, 1:6].argmax(0).tolist() == [3, 4, 5, 2, 1]
    assert torch.equal(mapping.sum(0), torch.ones(77)) and torch.equal(inherits, torch.ones(77))


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("1 girl , red hair", ["1 girl", "red hair"]),
        (", a cat ,, ,", ["a cat"]),
        (", ,,", []),
        ("", []),
        ("( fate ), ... hat !", ["fate", "hat"]),
        ("a \u3001 b \uff0c c", ["a", "b", "c"]),
        ("\U0001f431 , ^^", ["\U0001f431", "^^"]),
        ("no commas . none", ["no commas . none"]),
    ],
)
def test_tags_are_what_stands_between_commas_without_punctuation_around_it(text, tags):
    prompt = prompt_of(text)
    assert [tag_text(prompt, tag) for tag in split_tags(prompt)] == tags


@pytest.mark.parametrize("text", [",", ",,", "),", ",(", "\uff0c", "\u3001", "!,"])
def test_commas_of_any_kind_separate_tags(text):
    assert is_comma(text)


@pytest.mark.parametrize("text", [".", ")", "a", "a,b", "embedding:a,", "\U0001f431", ";"])
def test_other_words_do_not(text):
    assert not is_comma(text)


# Any pair of prompts: tokens


@given(texts, texts, modes, windows, windows)
def test_a_new_word_takes_nothing_and_inherits_nothing(left, right, mode, window, other):
    source, target = prompt_of(left, window), prompt_of(right, other)
    alignment, mapping, inherits = mapped(source, target, mode)
    columns = source_tokens(target, alignment.new)
    assert not mapping[:, columns].any() and not inherits[columns].any()


@given(texts, texts, modes, windows, windows)
def test_every_other_column_inherits(left, right, mode, window, other):
    source, target = prompt_of(left, window), prompt_of(right, other)
    alignment, mapping, inherits = mapped(source, target, mode)
    assert mapping.shape == (source.length, target.length) and inherits.shape == (target.length,)
    new = set(source_tokens(target, alignment.new))
    assert [bool(value) for value in inherits] == [column not in new for column in range(target.length)]
    assert set(inherits.tolist()) <= {0.0, 1.0}


@given(texts, texts, modes, windows, windows)
def test_equal_token_counts_pair_one_to_one(left, right, mode, window, other):
    source, target = prompt_of(left, window), prompt_of(right, other)
    alignment, mapping, _ = mapped(source, target, mode)
    for pairing in alignment.pairings:
        rows, columns = source_tokens(source, pairing.source), source_tokens(target, pairing.target)
        if len(rows) == len(columns):
            assert torch.equal(mapping[rows][:, columns], torch.eye(len(rows)))
            assert (mapping[:, columns].sum(0) == 1).all()


@given(texts, texts, modes, windows, windows)
def test_unequal_token_counts_share_every_source_token_evenly(left, right, mode, window, other):
    """As in the paper's code; the attention paid to the source's words is kept in sum."""
    source, target = prompt_of(left, window), prompt_of(right, other)
    alignment, mapping, _ = mapped(source, target, mode)
    for pairing in alignment.pairings:
        rows, columns = source_tokens(source, pairing.source), source_tokens(target, pairing.target)
        if len(rows) != len(columns):
            assert (mapping[rows][:, columns] == 1 / len(columns)).all()
            torch.testing.assert_close(mapping[rows][:, columns].sum(1), torch.ones(len(rows)))
            torch.testing.assert_close(
                mapping[:, columns].sum(0), torch.full((len(columns),), len(rows) / len(columns))
            )


@given(texts, texts, modes, windows, windows)
def test_a_word_reads_no_token_outside_its_pairing(left, right, mode, window, other):
    source, target = prompt_of(left, window), prompt_of(right, other)
    alignment, mapping, _ = mapped(source, target, mode)
    for pairing in alignment.pairings:
        others = mapping[:, source_tokens(target, pairing.target)].clone()
        others[source_tokens(source, pairing.source)] = 0
        assert not others.any()


@given(texts, texts, modes, windows)
def test_columns_sum_to_one_or_zero_where_token_counts_are_equal(left, right, mode, window):
    source, target = prompt_of(left, window), prompt_of(right, window)
    alignment, mapping, _ = mapped(source, target, mode)
    uneven = {
        column
        for pairing in alignment.pairings
        if len(source_tokens(source, pairing.source)) != len(source_tokens(target, pairing.target))
        for column in source_tokens(target, pairing.target)
    }
    sums = mapping.sum(0)
    assert all(sums[column] in (0.0, 1.0) for column in range(target.length) if column not in uneven)


FRESH = [f"new{n}" for n in range(6)] + [f"ne|wer{n}" for n in range(6)]


@st.composite
def edited_texts(draw):
    """A source of words that differ, and a target that keeps some, in order: (source, target, kept pairs)."""
    words = draw(
        st.lists(
            st.sampled_from([f"w{n}" for n in range(8)] + ["lo|ng", "lo|ng|er"]), unique=True, max_size=8
        )
    )
    target, kept, fresh = [], [], iter(draw(st.permutations(FRESH)))
    for n, word in enumerate(words):
        for kind in draw(st.lists(st.sampled_from(["keep", "new", "drop"]), max_size=2)):
            if kind == "keep" and (not kept or kept[-1][0] != n):
                kept.append((n, len(target)))
                target.append(word)
            elif kind == "new":
                target.append(next(fresh, "last"))
    return " ".join(words), " ".join(target), kept


@given(edited_texts(), modes, windows)
def test_words_in_common_and_in_order_keep_their_maps(edited, mode, window):
    """Whatever is swapped, added or removed around them, and however many tokens that takes."""
    left, right, kept = edited
    source, target = prompt_of(left, window), prompt_of(right, window)
    _, mapping, inherits = mapped(source, target, mode)
    for i, j in kept:
        rows, columns = tokens_of(source, i), tokens_of(target, j)
        expected = torch.zeros(source.length, len(columns))
        expected[rows, range(len(columns))] = 1
        assert torch.equal(mapping[:, columns], expected)
        assert inherits[columns].all()


@given(texts, st.integers(0), modes)
def test_where_words_are_only_added_all_modes_agree_and_every_old_word_keeps_its_map(text, seed, mode):
    chance = random.Random(seed)
    words = text.split()
    target_words, kept = [], []
    for word in words:
        target_words += [f"added{len(target_words)}"] * chance.randint(0, 1)
        kept.append(len(target_words))
        target_words.append(word)
    source, target = prompt_of(text), prompt_of(" ".join(target_words))
    alignment, mapping, _ = mapped(source, target, mode)
    assert [(p.source, p.target) for p in alignment.pairings] == [((i,), (j,)) for i, j in enumerate(kept)]
    assert torch.equal(mapping, mapped(source, target, "refine")[1])


@given(texts, texts, modes, windows, windows)
def test_start_maps_to_start_and_end_to_end_in_every_chunk(left, right, mode, window, other):
    source, target = prompt_of(left, window), prompt_of(right, other)
    _, mapping, inherits = mapped(source, target, mode)
    for n, chunk in enumerate(target.chunks):
        origin = source.chunks[min(n, len(source.chunks) - 1)]
        for row, column in ((origin.start, chunk.start), (origin.end, chunk.end)):
            assert mapping[:, column].nonzero().flatten().tolist() == [row]
            assert mapping[row, column] == 1 and inherits[column] == 1


@given(texts, texts, modes, windows)
def test_padding_keeps_its_position_in_the_chunk_and_never_reads_a_word(left, right, mode, window):
    """Target padding at j takes the source's at max(j, first padding of the source)."""
    source, target = prompt_of(left, window), prompt_of(right, window)
    _, mapping, inherits = mapped(source, target, mode)
    for n, chunk in enumerate(target.chunks):
        origin = source.chunks[min(n, len(source.chunks) - 1)]
        first = min(origin.end + 1, origin.stop - 1)  # a chunk without padding ends in its end token
        for column in range(chunk.end + 1, chunk.stop):
            row = max(origin.start + column - chunk.start, first)
            assert mapping[:, column].nonzero().flatten().tolist() == [row]
            assert mapping[row, column] == 1 and inherits[column] == 1


@given(texts, texts, modes)
def test_the_description_names_every_word_of_both_prompts(left, right, mode):
    source, target = prompt_of(left), prompt_of(right)
    alignment = align(source, target, mode)
    said: dict[str, list[str]] = {kind: [] for kind in ("shared", "new, own map", "removed", "swapped")}
    for line in alignment.describe(source, target).splitlines():
        text, kind = line.removesuffix(")").rsplit(" (", 1)
        said[kind] += [text] if kind == "swapped" else text.removeprefix("+ ").removeprefix("- ").split()
    assert said["new, own map"] == [target.words[j].text for j in alignment.new]
    assert said["removed"] == [source.words[i].text for i in alignment.removed]
    swapped = [pairing for pairing in alignment.pairings if pairing.swapped]
    assert said["swapped"] == [
        f"{tag_text(source, pairing.source)} -> {tag_text(target, pairing.target)}" for pairing in swapped
    ]
    shared = [pairing for pairing in alignment.pairings if not pairing.swapped]
    assert said["shared"] == [target.words[pairing.target[0]].text for pairing in shared]


def test_the_description_has_a_line_for_every_run_of_words():
    source, target = prompt_of("a cat , red hair , hat"), prompt_of("hat , a dog , red hair by night")
    assert align(source, target, "auto").describe(source, target).splitlines() == [
        "hat (shared)",
        ", (shared)",
        "a (shared)",
        "cat -> dog (swapped)",
        ", red hair (shared)",
        "+ by night (new, own map)",
    ]


# Small examples


def describe(left, right, mode="auto"):
    source, target = prompt_of(left), prompt_of(right)
    alignment = align(source, target, mode)

    def text(prompt, words):
        return " ".join(prompt.words[word].text for word in words)

    swapped = [(text(source, p.source), text(target, p.target)) for p in alignment.pairings if p.swapped]
    return swapped, text(target, alignment.new).split(), text(source, alignment.removed).split()


@pytest.mark.parametrize(
    ("source", "target", "swapped", "new", "removed"),
    [
        ("a cat", "a cat", [], [], []),
        ("a cat", "a dog", [("cat", "dog")], [], []),
        ("a cat and a hat", "a dog and a car", [("cat", "dog"), ("hat", "car")], [], []),
        ("a big cat", "a tiny dog", [("big", "tiny"), ("cat", "dog")], [], []),
        ("a cat sat", "a very big dog sat", [("cat", "very big dog")], [], []),
        ("a very big dog sat", "a cat sat", [("very big dog", "cat")], [], []),
        ("a cat", "photo of a cat", [], ["photo", "of"], []),
        ("a cat", "a cat at night", [], ["at", "night"], []),
        ("photo of a cat at night", "a cat", [], [], ["photo", "of", "at", "night"]),
        ("a cat on a mat", "a fluffy dog on a mat at night", [("cat", "fluffy dog")], ["at", "night"], []),
        ("a cat", "", [], [], ["a", "cat"]),
        ("", "a cat", [], ["a", "cat"], []),
        ("cat", "dog", [("cat", "dog")], [], []),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "swap"])
def test_runs_are_swapped_added_or_removed(source, target, swapped, new, removed, mode):
    assert describe(source, target, mode) == (swapped, new, removed)


def test_refine_counts_swapped_words_as_new():
    assert describe("a cat sat", "a big dog sat", "refine") == ([], ["big", "dog"], ["cat"])


def test_repeated_words_pair_with_the_earliest():
    source, target = prompt_of("a cat and a cat"), prompt_of("a cat")
    assert align(source, target, "auto").pairings == (Pairing((0,), (0,), False), Pairing((1,), (1,), False))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="auto, swap, refine"):
        align(prompt_of("a"), prompt_of("b"), "replace")  # type: ignore[arg-type]


def published_swap_mapper(rows, columns, length):
    """The tail of the swap mapper as published: `mapper[j, j] = 1` after the swapped word (wrong)."""
    mapper = torch.zeros(length, length)
    i = j = 0
    while i < length and j < length:
        if i == rows[0]:
            mapper[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1 / len(columns)
            i, j = i + len(rows), j + len(columns)
        elif i < rows[0]:
            mapper[i, j] = 1
            i, j = i + 1, j + 1
        else:
            mapper[j, j] = 1
            i, j = i + 1, j + 1
    return mapper


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a cat on a red mat", "a cro|co|dile on a red mat"),
        ("a cro|co|dile on a red mat", "a cat on a red mat"),
        ("a cat on a bi|cycle", "a big cat dog on a bi|cycle"),
        ("a cat , a bi|cycle and a hat", "a bi|son , a car and a hat"),
    ],
)
def test_mistake_of_the_published_swap_mapper_every_word_after_an_uneven_swap_reads_its_own_map(left, right):
    source, target = prompt_of(left), prompt_of(right)
    alignment, mapping, _ = mapped(source, target, "swap")
    after = [p for p in alignment.pairings if not p.swapped and p.source[0] > 1]
    places = [(source_tokens(source, p.source), source_tokens(target, p.target)) for p in after]
    assert any(rows != columns for rows, columns in places)  # the prompts are out of step
    for rows, columns in places:
        assert torch.equal(mapping[rows][:, columns], torch.eye(len(rows)))
        assert (mapping[:, columns].sum(0) == 1).all()


def test_the_published_swap_mapper_fails_that_test():
    source, target = prompt_of("a cat on a mat"), prompt_of("a cro|co|dile on a mat")
    published = published_swap_mapper(tokens_of(source, 1), tokens_of(target, 1), 77)
    _, ours, _ = mapped(source, target, "swap")
    assert torch.equal(published[:, :5], ours[:, :5])
    assert published[tokens_of(source, 4), tokens_of(target, 4)] == 0
    assert ours[tokens_of(source, 4), tokens_of(target, 4)] == 1


def test_padding_of_a_shorter_target_takes_no_word_of_the_source():
    source, target = prompt_of("a b c", window=8), prompt_of("a", window=8)
    _, mapping, _ = mapped(source, target, "auto")
    # source: 0 start, 1-3 words, 4 end, 5-7 padding; target: 0 start, 1 word, 2 end, 3-7 padding
    assert mapping.argmax(0).tolist() == [0, 1, 4, 5, 5, 5, 6, 7]


def test_padding_of_a_longer_target_keeps_its_position():
    source, target = prompt_of("a", window=8), prompt_of("a b c", window=8)
    _, mapping, inherits = mapped(source, target, "auto")
    assert inherits.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert mapping.argmax(0).tolist() == [0, 1, 0, 0, 2, 5, 6, 7]


def test_a_chunk_that_the_source_lacks_takes_start_end_and_padding_from_its_last():
    source, target = prompt_of("a b", window=6), prompt_of("a b x y z", window=6)
    _, mapping, inherits = mapped(source, target, "refine")
    # source: 0 start, 1-2 words, 3 end, 4-5 padding
    # target: 0 start, 1-4 words, 5 end; 6 start, 7 word, 8 end, 9-11 padding
    assert inherits.tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    columns = [0, 1, 2, 5, 6, 8, 9, 10, 11]
    assert mapping.argmax(0)[columns].tolist() == [0, 1, 2, 3, 0, 3, 4, 4, 5]


def test_a_word_split_over_two_chunks_keeps_its_map():
    source, target = prompt_of("a b bi|cycle", window=5), prompt_of("bi|cycle", window=5)
    _, mapping, _ = mapped(source, target, "auto")
    assert tokens_of(source, 2) == [3, 6]
    assert mapping[3, 1] == 1 and mapping[6, 2] == 1
