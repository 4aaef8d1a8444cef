"""Words from any tokenizer's pieces: which letters tokens spell, where text encoders agree on a border."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from p2p.attention.alignment import align, token_mapping
from p2p.attention.prompt import Chunk, Prompt, spell
from p2p.attention.vocabulary import (
    SPELLINGS,
    common_words,
    fold,
    folded,
    inside,
    spelled,
    spelling_of,
    words_in,
)

PROBES = {
    "CLIP's": ["a</w>", "flu", "ffy</w>", "cat</w>", "on</w>", "a</w>", "beach</w>"],
    "byte-level": ["a", "\u0120flu", "ffy", "\u0120cat", "\u0120on", "\u0120a", "\u0120beach"],
    "SentencePiece": ["\u2581", "a", "\u2581flu", "ffy", "\u2581cat", "\u2581on", "\u2581a", "\u2581beach"],
    "WordPiece": ["a", "flu", "##ffy", "cat", "on", "a", "beach"],
}


def letters_of(vocabulary, pieces):
    """The letters of pieces whose tokens are 0, 1, ..."""
    return folded(spelled((SPELLINGS[vocabulary](piece), (n,)) for n, piece in enumerate(pieces)))


def words_of(text, vocabulary, pieces):
    return [(word.text, word.tokens) for word in common_words(text, [letters_of(vocabulary, pieces)], [0])]


@pytest.mark.parametrize("vocabulary", PROBES)
def test_a_vocabulary_is_known_by_how_it_spells_a_sentence(vocabulary):
    assert spelling_of(PROBES[vocabulary]) is SPELLINGS.get(vocabulary, SPELLINGS["byte-level"])


def test_a_tokenizer_that_loses_spaces_is_of_no_vocabulary():
    assert spelling_of(["a", "fl", "uff", "yc", "aton", "abe", "ach"]) is None


@pytest.mark.parametrize(
    ("vocabulary", "text", "pieces", "words"),
    [
        ("byte-level", "a bicycle", ["a</w>", "bi", "cycle</w>"], [("a", (0,)), ("bicycle", (1, 2))]),
        ("SentencePiece", "a lion.", ["\u2581", "a", "\u2581", "lion", "."], None),
        ("byte-level", "35 cats", ["3", "5", "\u0120cats"], [("35", (0, 1)), ("cats", (2,))]),
        ("byte-level", "black-and", ["black", "-and"], [("black", (0,)), ("-and", (1,))]),
        ("byte-level", "a  red\n", ["a", "\u0120", "\u0120red", "\u010a"], [("a", (0,)), ("red", (1, 2, 3))]),
        ("WordPiece", "Caf\u00e9s", ["caf", "##es"], [("caf\u00e9s", (0, 1))]),
        ("WordPiece", "a \U0001f389 hat", ["a", "[UNK]", "hat"], None),
        ("SentencePiece", "\u732b", ["\u2581", "<0xE7>", "<0x8C>", "<0xAB>"], [("\u732b", (0, 1, 2, 3))]),
        ("SentencePiece", "\u732b\u72ac cat", ["\u2581", "<unk>", "\u2581cat"], None),
        (
            "SentencePiece",
            "\uff21\uff0cb",
            ["\u2581A", ",", "b"],
            [("\uff41", (0,)), ("\uff0c", (1,)), ("b", (2,))],
        ),
    ],
)
def test_words_are_the_texts_where_tokens_allow(vocabulary, text, pieces, words):
    expected = {
        "a lion.": [("a", (0, 1)), ("lion", (2, 3)), (".", (4,))],
        "a \U0001f389 hat": [("a", (0,)), ("\U0001f389", (1,)), ("hat", (2,))],
        "\u732b\u72ac cat": [("\u732b\u72ac", (0, 1)), ("cat", (2,))],
    }
    assert words_of(text, vocabulary, pieces) == (words or expected[text])


def test_characters_that_share_bytes_of_a_token_are_one_word():
    one, two = spell("\u732b"), spell("\u72ac")
    apart = [one[0], one[1:], two]
    across = [one[:2], one[2:] + two[0], two[1:]]
    assert words_of("\u732b\u72ac", "byte-level", apart) == [("\u732b", (0, 1)), ("\u72ac", (2,))]
    assert words_of("\u732b\u72ac", "byte-level", across) == [("\u732b\u72ac", (0, 1, 2))]


def test_a_textual_inversion_is_one_word_of_all_its_vectors():
    pieces = [(b"a", (0,)), (b"embedding:my-cat.pt", (1, 2, 3)), (b" hat", (4,))]
    words = common_words("a embedding:my-cat.pt hat", [folded(spelled(pieces))], [0])
    assert [word.tokens for word in words] == [(0,), (1, 2, 3), (4,)]


def test_a_word_has_its_tokens_of_every_stream():
    clip = letters_of("byte-level", ["3</w>", "5</w>", "mm</w>", "lens</w>"])
    t5 = letters_of("SentencePiece", ["\u258135", "mm", "\u2581", "lens"])
    words = common_words("35mm Lens", [clip, t5], [1, 77])
    assert [(word.text, word.tokens) for word in words] == [
        ("35", (1, 2, 77)),
        ("mm", (3, 78)),
        ("lens", (4, 79, 80)),
    ]


def test_what_a_stream_cuts_off_has_tokens_of_the_others():
    whole, short = (letters_of("WordPiece", words) for words in (["a", "red", "cat"], ["a", "red"]))
    assert [word.tokens for word in common_words("a red cat", [whole, short], [0, 9])] == [
        (0, 9),
        (1, 10),
        (2,),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't, cat's 'a' it\u2019s", ["don", "'t", ",", "cat", "'s", "'", "a", "'", "it", "\u2019s"]),
        ("1girl long_hair f/1.8", ["1", "girl", "long", "_", "hair", "f", "/", "1", ".", "8"]),
        ("\u4e00\u53ea\u732b\uff0ccat\u30ab", ["\u4e00", "\u53ea", "\u732b", "\uff0c", "cat", "\u30ab"]),
        (
            "\u2764\ufe0f\U0001f431\U0001f44d\U0001f3fd",
            ["\u2764\ufe0f", "\U0001f431", "\U0001f44d\U0001f3fd"],
        ),
        ("\U0001f468\u200d\U0001f469 a", ["\U0001f468\u200d\U0001f469", "a"]),
        (
            "\uace0\uc591\uc774 \u0928\u092e\u0938\u094d\u0924\u0947",
            ["\uace0\uc591\uc774", "\u0928\u092e\u0938\u094d\u0924\u0947"],
        ),
        ("a embedding:my-cat.pt, hat", ["a", "embedding:my-cat.pt", ",", "hat"]),
    ],
)
def test_a_text_is_cut_into_words_as_people_read_it(text, words):
    assert [text[start:stop] for start, stop in words_in(text)] == words


@given(st.text(max_size=40))
def test_words_of_a_text_hold_all_of_it_but_white_space(text):
    spans = words_in(text)
    assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    left = set(range(len(text))) - {n for start, stop in spans for n in range(start, stop)}
    assert all(text[n].isspace() or unicodedata.category(text[n]) == "Cc" for n in left)


@given(st.lists(st.text("ab\u732b\u00e9 '1,", min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_token_that_spells_a_letter_belongs_to_one_word(pieces):
    text = "".join(pieces)
    tokens = [token for _, owned in words_of(text, "byte-level", map(spell, pieces)) for token in owned]
    assert tokens == (list(range(len(pieces))) if fold(text) else [])


@pytest.mark.parametrize("text", ["cat", "a", "user", " a  cat ", "assistant user\n"])
def test_a_prompt_is_found_inside_of_its_template(text):
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    letters = spelled((letter.encode(), (n,)) for n, letter in enumerate(before + text + after))
    assert [letter for letter, _ in inside(letters, before, after)] == list(text)


def prompt_with(template, words, padding):
    """A prompt of one stream: a template of some tokens on either side, one-token words, padding."""
    first, end = template, template + len(words)
    chunk = Chunk(0, 0, first, end, end + template, end + template + padding)
    read = common_words(" ".join(words), [letters_of("WordPiece", words)], [first])
    return Prompt(" ".join(words), read, (chunk,))


@pytest.mark.parametrize("words", [["a", "cat"], ["a", "big", "red", "cat"]])
def test_templates_of_prompts_of_unequal_length_are_shared_token_by_token(words):
    source, target = prompt_with(3, ["a", "cat"], 0), prompt_with(3, words, 2)
    mapping, inherits = token_mapping(source, target, align(source, target, "refine"))
    assert mapping[:3, :3].diagonal().tolist() == [1.0] * 3
    end = 3 + len(words)
    assert [mapping[:, end + n].nonzero().flatten().tolist() for n in range(3)] == [[5], [6], [7]]
    assert inherits.tolist() == [
        float(n < 3 or n >= end or words[n - 3] in ("a", "cat")) for n in range(end + 5)
    ]


def test_streams_are_mapped_each_for_itself():
    """A word of 1 + 2 tokens for one of 2 + 1: tokens of one encoder never take maps of the other's."""

    def prompt(first, second):
        streams = [letters_of("WordPiece", pieces) for pieces in (first, second)]
        text = "".join(piece.removeprefix("##") for piece in first)
        sizes = [len(pieces) for pieces in (first, second)]
        chunks = (
            Chunk(0, 0, 0, sizes[0], sizes[0], sizes[0]),
            Chunk(sizes[0], sizes[0], sizes[0], *[sum(sizes)] * 3, stream=1),
        )
        return Prompt(text, common_words(text, streams, [0, sizes[0]]), chunks)

    source, target = prompt(["cat"], ["ca", "##t"]), prompt(["do", "##g"], ["dog"])
    mapping, inherits = token_mapping(source, target, align(source, target, "auto"))
    assert mapping.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert inherits.tolist() == [1.0, 1.0, 1.0]
