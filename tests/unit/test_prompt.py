"""Words and tokens: what `read_prompt` makes of the vocabulary's pieces, and what `find` finds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from p2p.attention.prompt import END, START, Word, WordNotFound, read_prompt, spell, split_words
from p2p.tests.prompts import pieces_of, prompt_of


def spelled(text: str) -> str:
    """Text as CLIP's vocabulary spells its bytes (GPT-2's table of printable stand-ins)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    return "".join(table[byte] for byte in text.encode())


def test_a_word_is_all_pieces_up_to_the_one_that_ends_it():
    prompt = prompt_of("a bi|cy|cle ,")
    assert prompt.words == (Word("a", (1,)), Word("bicycle", (2, 3, 4)), Word(",", (5,)))


def test_length_counts_start_end_and_padding():
    prompt = prompt_of("a cat")
    assert prompt.length == 77
    (chunk,) = prompt.chunks
    assert (chunk.start, chunk.end, chunk.stop) == (0, 3, 77)


def test_tokens_of_later_chunks_are_positions_in_the_whole_conditioning():
    prompt = prompt_of("a b c d e f g", window=5)
    assert [(chunk.start, chunk.end, chunk.stop) for chunk in prompt.chunks] == [
        (0, 4, 5),
        (5, 9, 10),
        (10, 12, 15),
    ]
    assert [word.tokens for word in prompt.words] == [(1,), (2,), (3,), (6,), (7,), (8,), (11,)]
    assert prompt.length == 15


def test_a_word_runs_on_over_the_border_of_a_chunk():
    prompt = prompt_of("a b bi|cy|cle x", window=5)
    assert prompt.words[2] == Word("bicycle", (3, 6, 7))
    assert prompt.words[3] == Word("x", (8,))


def test_a_chunk_filled_to_the_brim_has_no_padding():
    prompt = prompt_of(" ".join("abc"), window=5)
    assert (prompt.chunks[0].end, prompt.chunks[0].stop) == (4, 5)


def test_padding_other_than_the_end_token_is_padding_too():
    prompt = read_prompt("cat", [[START, "cat</w>", END, "!</w>", "!</w>"]])
    assert [word.text for word in prompt.words] == ["cat"]
    assert prompt.chunks[0].end == 2


def test_an_unfinished_word_at_the_end_is_kept():
    assert read_prompt("bi", [[START, "a</w>", "bi", END]]).words[-1] == Word("bi", (2,))


@pytest.mark.parametrize(
    "text", ["caf\u00e9", "na\u00efve", "\U0001f389", "\u732b", "stra\u00dfe", "don't", "\u00bd"]
)
def test_words_are_read_as_people_write_them(text):
    prompt = read_prompt(text, [[START, spelled(text) + "</w>", END]])
    assert prompt.words[0].text == text


@pytest.mark.parametrize("text", ["caf\u00e9", "\U0001f389", "\u732b"])
def test_a_letter_whose_bytes_are_spread_over_pieces_is_put_together(text):
    letters = spelled(text)
    prompt = read_prompt(text, [[START, *letters[:-1], letters[-1] + "</w>", END]])
    assert prompt.words[0] == Word(text, tuple(range(1, len(letters) + 1)))


@pytest.mark.parametrize(
    "pieces", [[[]], [["cat</w>", END]], [[START, "cat</w>"]], [[START, "a</w>", END], ["b</w>", END]]]
)
def test_pieces_laid_out_otherwise_are_refused(pieces):
    with pytest.raises(ValueError, match="chunk of tokens"):
        read_prompt("cat", pieces)


CAT = "a cat , and a big cat on the red bi|cycle"


@pytest.mark.parametrize(
    ("phrase", "tokens"),
    [
        ("and", (4,)),
        ("bicycle", (11, 12)),
        ("cat", (2, 7)),
        ("CAT", (2, 7)),
        ("  cat ", (2, 7)),
        ("cat#1", (2,)),
        ("cat#2", (7,)),
        ("Cat # 2", (7,)),
        ("big cat", (6, 7)),
        ("a cat", (1, 2)),
        ("red  bicycle", (10, 11, 12)),
        ("cat,", (2, 3)),
        ("big cat,", (6, 7)),
        ("(Big cat:1.2)", (6, 7)),
        ("((cat)#2", (7,)),
        (",", (3,)),
        ("a#2", (5,)),
    ],
)
def test_find_gives_the_tokens_of_words_phrases_and_occurrences(phrase, tokens):
    assert prompt_of(CAT).find(phrase) == tokens
    assert prompt_of(CAT).contains(phrase)


@pytest.mark.parametrize(
    "phrase", ["dog", "ca", "at", "cats", "cat on red", "bi", "cat#3", "cat#0", "dog#1", "", " ", "#1"]
)
def test_what_is_not_a_word_of_the_prompt_is_not_found(phrase):
    with pytest.raises(WordNotFound):
        prompt_of(CAT).find(phrase)
    assert not prompt_of(CAT).contains(phrase)


def test_a_word_that_is_not_found_is_an_error_that_lists_the_words():
    with pytest.raises(WordNotFound) as error:
        prompt_of("a cat , on a bi|cycle").find("dog")
    assert '"dog"' in str(error.value)
    assert str(error.value).endswith("Its words are: a, cat, on, bicycle.")


def tags_of(text):
    """A prompt cut as CLIP's tokenizer cuts it: letters, digits and other marks apart."""
    words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower())
    return replace(prompt_of(" ".join(words)), text=text)


@pytest.mark.parametrize(
    ("phrase", "tokens"),
    [
        ("long hair", (3, 4, 5)),
        ("long_hair", (3, 4, 5)),
        ("LONG_HAIR,", (3, 4, 5, 6)),
        ("hair", (5, 9)),
        ("short_hair", (7, 8, 9)),
        ("short", (7,)),
        ("(short hair:1.2)", (7, 8, 9)),
        ("hair#2", (9,)),
        ("_long_hair_", (3, 4, 5)),
    ],
)
def test_an_underscore_is_white_space(phrase, tokens):
    assert tags_of("1girl long_hair, short_hair").find(phrase) == tokens
    assert tags_of("1girl long hair").contains("long_hair")


def test_an_underscore_alone_is_the_word_that_it_is():
    assert tags_of("1girl, long_hair").find("_") == (5,)
    assert not tags_of("1girl, long_hair").contains("ong_hair")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1girl, long_hair, hat", "1girl, long_hair, hat"),
        ("a (red:1.3) ((Big)) cat, a cat", "a, red, big, cat"),
        (r"saber \(fate\), it's 5%", "saber, fate, it's, 5"),
        ("black-and-white. f/1.8", "black-and-white, f/1.8"),
        ("...", "(none)"),
    ],
)
def test_the_words_that_are_there_are_listed_as_they_were_written(text, words):
    with pytest.raises(WordNotFound) as error:
        tags_of(text).find("zebra")
    assert str(error.value).endswith(f"Its words are: {words}.")
    assert all(tags_of(text).contains(word) for word in words.split(", ") if word != "(none)")


def test_characters_of_writing_without_spaces_are_listed_one_by_one():
    letters = spelled("\u732b\u72ac")
    prompt = read_prompt("\u732b\u72ac", [[START, *letters[:-1], letters[-1] + "</w>", END]])
    with pytest.raises(WordNotFound, match="Its words are: \u732b, \u72ac."):
        prompt.find("cat")


@pytest.mark.parametrize(
    ("phrase", "meant"),
    [("dcuk", "duck"), ("Ducks", "duck"), ("long hiar", "long_hair"), ("dcuk#2", "duck"), ("zebra", None)],
)
def test_a_word_that_is_nearly_there_is_named(phrase, meant):
    with pytest.raises(WordNotFound) as error:
        tags_of("a duck with long_hair on a lake").find(phrase)
    said = re.findall(r'Did you mean "(.*)"\?', str(error.value))
    assert said == ([] if meant is None else [meant])


def test_an_occurrence_that_is_not_there_is_an_error_that_says_how_many_there_are():
    with pytest.raises(WordNotFound, match="2 times"):
        prompt_of(CAT).find("cat#3")


@pytest.mark.parametrize(
    ("phrase", "tokens"), [("car", (3,)), ("red", (1,)), ("red car", (1, 2, 3)), ("red\u200bcar", (1, 2, 3))]
)
def test_invisible_characters_do_not_matter(phrase, tokens):
    assert prompt_of("red \u200b car").find(phrase) == tokens


def test_a_number_sign_in_the_prompt_is_a_word_like_others():
    assert prompt_of("cat # 2 cat").find("cat #2") == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("cat", ["cat"]),
        ("cat, red hat", ["cat", "red hat"]),
        ("cat\n dog ,, ", ["cat", "dog"]),
        ('hat, "red, white and blue", "cat"#2', ["hat", "red, white and blue", "cat#2"]),
        ('a sign with "no", cat', ['a sign with "no"', "cat"]),
        ('"red\ncat', ["red", "cat"]),
        (" ,\n", []),
        ("", []),
    ],
)
def test_entries_of_a_widget_are_apart_by_commas_or_lines(text, entries):
    assert split_words(text) == entries


def test_hand_made_prompts_have_the_layout_of_the_host():
    (window,) = pieces_of("a bi|cycle")
    assert window[:5] == [START, "a</w>", "bi", "cycle</w>", END] and len(window) == 77


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\u732b\u72ac", ["\u732b", "\u72ac"]),
        ("\u30ab\u30e1\u30e9", ["\u30ab", "\u30e1", "\u30e9"]),
        ("\U0001f431\U0001f436", ["\U0001f431", "\U0001f436"]),
        ("\uace0\uc591\uc774", ["\uace0\uc591\uc774"]),
        ("\u2764\ufe0f\U0001f431", ["\u2764\ufe0f\U0001f431"]),
        ("\u732bcat", ["\u732bcat"]),
    ],
)
def test_chinese_japanese_and_symbols_are_read_by_characters_and_other_writing_by_words(text, words):
    letters = spelled(text)
    prompt = read_prompt(text, [[START, *letters[:-1], letters[-1] + "</w>", END]])
    assert [word.text for word in prompt.words] == words
    assert [token for word in prompt.words for token in word.tokens] == list(range(1, len(letters) + 1))


def test_characters_in_one_token_are_one_word():
    first, second = spelled("\u732b\u72ac"), spelled("\u732b")
    prompt = read_prompt("", [[START, first, second + "</w>", END]])
    assert prompt.words == (Word("\u732b\u72ac", (1,)), Word("\u732b", (2,)))


@pytest.mark.parametrize("text", ["embedding:caf\u00e9", "a", " \U0001f431"])
def test_names_are_spelled_as_the_vocabulary_does(text):
    assert spell(text) == spelled(text)
    assert read_prompt("", [[START, spell(text) + "</w>", END]]).words[0].text == text


LONG = 100_000
"""Letters. Whoever tries every pair of places, or every place where a gap could end, needs minutes."""

FILLINGS = ["1", ".", "#", "#1", "# ", " ", ":", ":1", "-", ",", "(", ")", "(a:1", "\\("]
FILLINGS += ['"', "_", "ab", "a ", "embedding:", "embedding:a.pt", "\n"]
FILLINGS += ["\u200b", "\u0301\u0316", "\ufffd", "\u732b", "\U0001f431"]


@pytest.mark.parametrize("filling", FILLINGS)
def test_long_phrases_are_looked_up_in_linear_time(filling):
    prompt, filling = prompt_of("a cat on a mat"), filling * (LONG // len(filling))
    with pytest.raises(WordNotFound, match="Its words are: a, cat, on, mat"):
        prompt.find(f"x{filling}x")
    assert not prompt.contains(f"cat{filling}#x") and not prompt.contains(f"cat#{filling}x")
    assert split_words(f"a{filling}x".replace("\n", " "))[-1].endswith("x")


def test_phrases_are_found_in_long_prompts_in_linear_time():
    prompt = prompt_of(" ".join(["a"] * LONG), window=1000)
    count = LONG * 2 // 5
    assert prompt.occurrences("a " * count) == [tuple(range(count)), tuple(range(count, 2 * count))]
    assert not prompt.contains("a " * (LONG // 2) + "b") and prompt.contains("a" * LONG)
    with pytest.raises(WordNotFound, match="Its words are: a$|Its words are: a\\."):
        prompt.find("zebra")


def test_a_long_prompt_of_many_words_lists_them_in_linear_time():
    words = [f"w{n}" for n in range(LONG // 5)]
    with pytest.raises(WordNotFound) as error:
        prompt_of(" ".join(words), window=1000).find("zebra")
    assert str(error.value).endswith(f"Its words are: {', '.join(words)}.")


def test_long_runs_of_characters_are_read_in_linear_time():
    letters = spelled("\ufffd" * (LONG // 3))
    prompt = read_prompt("", [[START, *letters[:-1], letters[-1] + "</w>", END]])
    assert prompt.words == tuple(Word("\ufffd", (n, n + 1, n + 2)) for n in range(1, len(letters) + 1, 3))


def test_an_entry_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="list of words cannot be read"):
        split_words("a" * 200_000)


@given(st.lists(st.sampled_from(["a", "b", "ab", "_"]), min_size=1, max_size=8), st.text("ab", max_size=6))
def test_a_phrase_is_found_wherever_a_run_of_words_spells_it(words, phrase):
    places, first = [], 0
    while first < len(words):
        runs = (range(first, last) for last in range(first + 1, len(words) + 1) if words[first] != "_")
        run = next((run for run in runs if "".join(words[n] for n in run).replace("_", "") == phrase), None)
        places += [tuple(run)] if run else []
        first = run.stop if run else first + 1
    assert prompt_of(" ".join(words)).occurrences(phrase) == places
