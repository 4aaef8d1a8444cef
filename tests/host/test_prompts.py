"""Prompts as people write them, with ComfyUI's own tokenizers: words, weights, chunks, textual inversions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from p2p.attention.alignment import MODES, align, token_mapping
from p2p.attention.prompt import WordNotFound, split_words
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes.page import alignment_data
from p2p.sampling.encode import read
from p2p.tests.conftest import ROOT
from p2p.tests.host.runs import EDITED, EMPTY, PART, Settings, Studio, assert_close, difference, empty
from p2p.tests.host.test_laws import naive_run

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(eq=False)
class Clip:
    """A CLIP object as far as words are concerned: the tokenizer of a model class, no encoder."""

    tokenizer: Any

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def entries(self, text: str) -> list[tuple]:
        """The host's own tokens: (token, weight, word), all chunks in a row, of the encoder read from."""
        encoders = self.tokenize(text, return_word_ids=True)
        chunks = next(encoders[name] for name in ("l", "h", "g") if name in encoders)
        return [entry for chunk in chunks for entry in chunk]

    def decode(self, ids: list[int]) -> str:
        """The vocabulary's own spelling of tokens."""
        tokenizer = next(
            getattr(self.tokenizer, name) for name in ("clip_l", "clip_h") if hasattr(self.tokenizer, name)
        ).tokenizer
        return tokenizer.decode(ids)


@pytest.fixture(scope="module")
def inversions(tmp_path_factory):
    """A folder of textual inversions: of one vector, of three, of twelve, and one for SDXL's two encoders."""
    folder = tmp_path_factory.mktemp("embeddings")
    for name, vectors in (("one", 1), ("three", 3), ("Twelve", 12), ("round(1)", 2)):
        torch.save({"emb_params": torch.randn(vectors, 768)}, folder / f"{name}.pt")
    torch.save({"emb_params": torch.randn(2, 768)}, folder / "caf\u00e9.bin")
    torch.save({"emb_params": torch.randn(2, 1024)}, folder / "other.pt")
    both = {"clip_l": torch.randn(4, 768), "clip_g": torch.randn(4, 1280)}
    torch.save(both, folder / "both.pt")
    torch.save({**both, "clip_g": torch.randn(2, 1280)}, folder / "uneven.pt")
    return str(folder)


SD1 = Clip(comfy.sd1_clip.SD1Tokenizer())
SD2 = Clip(comfy.text_encoders.sd2_clip.SD2Tokenizer())
SDXL = Clip(comfy.sdxl_clip.SDXLTokenizer())
CLIPS = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}
clips = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())


def words_of(prompt):
    return [word.text for word in prompt.words]


# Any prompt, of any of these pieces


PIECES = [
    *("a", "cat", "Cat", "red", "long", "hair", "on", "the", "of", "1girl", "2cats", "looking_at_viewer"),
    *("(red:1.3)", "((big))", "(long red hair:0.8)", "[soft]", "(a (very:1.5) red:1.2)", r"saber \(fate\)"),
    *(",", ", ,", ".", "!?", "...", "(", ")", "BREAK", "AND", "cat's", "don't", "black-and-white", "f/1.8"),
    *("caf\u00e9", "cafe\u0301", "na\u00efve", "\u00bd", "stra\u00dfe", "\u201cquoted\u201d"),
    *("\u043a\u043e\u0448\u043a\u0430", "\uace0\uc591\uc774", "\u0e41\u0e21\u0e27", "\u30ab\u30e1\u30e9"),
    *("\u732b", "\u767d\u3044\u732b\u3068\u72ac", "\uff0c", "\u3001", "\uff21\uff22"),
    *("\U0001f431", "\U0001f431\U0001f436", "\u2764\ufe0f", "\U0001f469\u200d\U0001f469\u200d\U0001f467"),
    *("antidisestablishmentarianism", "supercalifragilisticexpialidocious" * 3, "red\u200bcar"),
    *("\n", "\t", "#2", "c#", "<lora:x:1>", "{a|b}", "50%", '"quoted"'),
]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map(" ".join)
modes = st.sampled_from(MODES)


def readable(text, clip=SD1):
    try:
        return read(clip, text, "source")
    except ValueError as error:
        assert "no word" in str(error) or "empty" in str(error)
        assume(False)


@given(texts, st.sampled_from(list(CLIPS.values())))
@PROPERTY
def test_every_token_of_the_text_belongs_to_one_word_and_spells_it(text, clip):
    prompt, entries = readable(text, clip), clip.entries(text)
    assert prompt.length == len(entries)
    covered = [token for word in prompt.words for token in word.tokens]
    assert covered == [n for n, entry in enumerate(entries) if entry[2] != 0]
    for word in prompt.words:
        assert word.text == clip.decode([entries[token][0] for token in word.tokens]).strip()


@given(texts)
@PROPERTY
def test_the_words_are_the_text_without_spaces(text):
    """Nothing of the text is lost or doubled, whatever chunk it came into."""
    assume(not set("()\\") & set(text))
    assert "".join(words_of(readable(text))) == "".join(normalize("NFC", text).lower().split())


@given(texts, modes)
@PROPERTY
def test_equal_prompts_give_the_identity(text, mode):
    prompt = readable(text)
    alignment = align(prompt, prompt, mode)
    mapping, inherits = token_mapping(prompt, prompt, alignment)
    assert torch.equal(mapping, torch.eye(prompt.length)) and bool(inherits.all())
    assert not alignment.new and not alignment.removed


@given(texts, texts, modes)
@PROPERTY
def test_columns_of_words_read_words_and_columns_around_them_do_not(left, right, mode):
    """Of prompts with any numbers of chunks; checked with the host's own token lists."""
    source, target = readable(left), readable(right)
    mapping, inherits = token_mapping(source, target, align(source, target, mode))
    rows, columns = ([entry[2] != 0 for entry in SD1.entries(text)] for text in (left, right))
    assert mapping.shape == (len(rows), len(columns)) and inherits.shape == (len(columns),)
    for column, is_word in enumerate(columns):
        read_from = mapping[:, column].nonzero().flatten().tolist()
        assert all(rows[row] == is_word for row in read_from)
        assert bool(read_from) == bool(inherits[column])
        if not is_word:
            assert len(read_from) == 1 and mapping[read_from[0], column] == 1


@given(texts)
@PROPERTY
def test_every_word_is_found_by_its_own_name(text):
    prompt = readable(text)
    for word in prompt.words:
        if word.text.strip("\u200b"):
            assert set(word.tokens) <= set(prompt.find(word.text))


WEIGHTED = ["a", "cat", "red hair", "blue eyes", "hat", ",", "\U0001f431", "saber \\(fate\\)"]


@given(st.lists(st.tuples(st.sampled_from(WEIGHTED), st.integers(0, 3)), min_size=1, max_size=25), modes)
@PROPERTY
def test_weights_on_one_side_change_nothing_in_the_alignment(parts, mode):
    forms = ["{}", "({}:1.3)", "(({}))", "(({}:0.8) :1.1)"]
    plain = readable(" ".join(part for part, _ in parts))
    weighted = readable(" ".join(forms[form].format(part) for part, form in parts))
    assume(len(plain.chunks) == len(weighted.chunks) == 1)
    assert plain.words == weighted.words
    alignment = align(plain, weighted, mode)
    assert torch.equal(token_mapping(plain, weighted, alignment)[0], torch.eye(77))


# Words, phrases, occurrences


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1girl, looking_at_viewer", ["1", "girl", ",", "looking", "_", "at", "_", "viewer"]),
        (r"saber \(fate\), hat", ["saber", "(", "fate", "),", "hat"]),
        ("a cat,, hat", ["a", "cat", ",,", "hat"]),
        ("a BREAK b", ["a", "break", "b"]),
        ("((a) (red:1.5):1.2) car", ["a", "red", "car"]),
        ("(long red hair:1.2), hat", ["long", "red", "hair", ",", "hat"]),
        ("\uace0\uc591\uc774 \u043a\u043e\u0442", ["\uace0\uc591\uc774", "\u043a\u043e\u0442"]),
        ("\u8d64\u3044\u8eca\u3001\u732b", ["\u8d64", "\u3044", "\u8eca", "\u3001", "\u732b"]),
        ("\U0001f431\U0001f436", ["\U0001f431", "\U0001f436"]),
        ("\u2764\ufe0f", ["\u2764\ufe0f"]),
    ],
)
@clips
def test_words_of_real_prompts(clip, text, words):
    assert words_of(read(clip, text, "source")) == words


PROMPT = (
    "1girl, (long Red hair:1.2), caf\u00e9, saber \\(fate\\), \u8d64\u3044\u8eca, red hair, C# 2, it's 5%, "
    "Caf\u00e9"
)


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("1girl", ["1", "girl"]),
        ("girl", ["girl"]),
        ("RED HAIR", ["red", "hair", "red", "hair"]),
        ("red hair#2", ["red", "hair"]),
        ("(long red hair:1.2)", ["long", "red", "hair"]),
        ("((red hair))#1", ["red", "hair"]),
        ("(red hair", ["red", "hair", "red", "hair"]),
        ("hair:1.2)", ["hair", "hair"]),
        (r"saber \(fate\)", ["saber", "(", "fate"]),
        ("C# 2", ["c", "#", "2"]),
        ("c#", ["c", "#"]),
        ("it's", ["it", "'s"]),
        ("5%", ["5"]),
        ("2,", ["2", ","]),
        ("red hair, C#", ["red", "hair", ",", "c", "#"]),
        ("cafe\u0301", ["caf\u00e9", "caf\u00e9"]),
        ("caf\u00e9#2", ["caf\u00e9"]),
        ("\u8eca", ["\u8eca"]),
        ("\u8d64\u3044", ["\u8d64", "\u3044"]),
        ("\uff11girl", ["1", "girl"]),
    ],
)
def test_phrases_are_found_as_people_write_them(phrase, words):
    prompt = read(SD1, PROMPT, "source")
    found = prompt.find(phrase)
    assert [word.text for token in found for word in prompt.words if word.tokens[0] == token] == words


@pytest.mark.parametrize("phrase", ["red", "red hair, C#", "long red hair"])
def test_a_phrase_in_a_list_of_words_may_hold_commas_in_quotes(phrase):
    (first, entry) = split_words(f'hat, "{phrase}"')
    assert first == "hat" and read(SD1, PROMPT, "source").find(entry)


def test_words_that_are_not_there_are_an_error_that_lists_those_that_are():
    with pytest.raises(WordNotFound, match=r"\"red hat\".* Its words are: 1, girl, long, red, hair, caf"):
        read(SD1, PROMPT, "source").find("red hat")
    with pytest.raises(WordNotFound, match=r"\"red hair\" occurs 2 times"):
        read(SD1, PROMPT, "source").find("red hair#3")


@pytest.mark.parametrize("text", ["()", "(())", "( )", "( :1.2)"])
def test_a_prompt_without_words_is_refused(text):
    with pytest.raises(ValueError, match="target prompt .* has no word"):
        read(SD1, text, "target")


# Long prompts


def test_prompts_of_different_numbers_of_chunks_share_their_words():
    source = read(SD1, "cat, " * 20 + "red hair", "source")
    target = read(SD1, "cat, " * 60 + "blue hair", "target")
    assert (source.length, target.length) == (77, 154)
    for left, right in ((source, target), (target, source)):
        mapping, inherits = token_mapping(left, right, align(left, right, "auto"))
        hair = right.find("hair")
        assert mapping[left.find("hair"), hair] == 1 and inherits[list(hair)] == 1


def test_a_segment_that_moved_into_the_next_chunk_keeps_its_maps():
    """A weight makes the host move the segment whole; without it only its last word is in chunk two."""
    plain = "cat " * 73 + "very red castle"
    moved = "cat " * 73 + "(very red castle:1.2)"
    left, right = read(SD1, plain, "source"), read(SD1, moved, "target")
    assert [left.words[-1].tokens, right.words[-1].tokens] == [(78,), (80,)]
    mapping, inherits = token_mapping(left, right, align(left, right, "auto"))
    for a, b in zip(left.words, right.words, strict=True):
        assert mapping[a.tokens[0], b.tokens[0]] == 1
    gap = range(right.words[-3].tokens[0] - 3, 76)  # padding in front of the border
    assert bool(inherits.all()) and gap.stop == 76


# Textual inversions


def clip_with(folder, kind=comfy.sd1_clip.SD1Tokenizer):
    return Clip(kind(embedding_directory=folder))


NAMED = pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a embedding:one cat", ["a", "embedding:one", "cat"]),
        ("embedding:three, (embedding:one:1.2)", ["embedding:three", ",", "embedding:one"]),
        ("a (embedding:three red:1.2)", ["a", "embedding:three", "red"]),
        ("(a cat:1.1)embedding:one hat", ["a", "cat", "embedding:one", "hat"]),
        ("embedding:three.pt, embedding:one,, a", ["embedding:three.pt", ",", "embedding:one", ",,", "a"]),
        ("a\nembedding:caf\u00e9 hat", ["a", "embedding:caf\u00e9", "hat"]),
        ("a,embedding:one", ["a", ",", "embedding", ":", "one"]),
        (r"(embedding:round\(1\), hat:1.2)", ["embedding:round(1)", ",", "hat"]),
        (r"\(embedding:one\)", ["(", "embedding", ":", "one", ")"]),
        ("embedding:lost, embedding:one", [",", "embedding:one"]),
        ("embedding:one embedding:lost embedding:three", ["embedding:one", "embedding:three"]),
        ("cat " * 70 + "embedding:Twelve hat", ["cat"] * 70 + ["embedding:Twelve", "hat"]),
        ("cat " * 70 + "embedding:three " * 3, ["cat"] * 70 + ["embedding:three"] * 3),
    ],
)


@NAMED
def test_textual_inversions_are_words_by_their_names(inversions, text, words):
    check_inversions(inversions, text, words)


@NAMED
@pytest.mark.usefixtures("later_textual_inversions")
def test_so_they_are_in_later_hosts(inversions, text, words):
    check_inversions(inversions, text, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat,\tembedding:three", ["a", "cat", ",", "embedding:three"]),
        ("a\u00a0embedding:one\rembedding:three", ["a", "embedding:one", "embedding:three"]),
        ("embedding:one<x> cat", ["embedding:one", "<", "x", ">", "cat"]),
        ("a embedding:three[red, embedding:one", ["a", "embedding:three", "[", "red", ",", "embedding:one"]),
        ("embedding:lost[red", ["[", "red"]),
    ],
)
@pytest.mark.usefixtures("later_textual_inversions")
def test_names_follow_any_white_space_and_end_at_brackets_in_later_hosts(inversions, text, words):
    check_inversions(inversions, text, words)


def check_inversions(inversions, text, words):
    clip = clip_with(inversions)
    prompt, entries = read(clip, text, "source"), clip.entries(text)
    assert words_of(prompt) == words
    vectors = [n for n, entry in enumerate(entries) if torch.is_tensor(entry[0])]
    named = [word for word in prompt.words if word.text.startswith("embedding:")]
    assert [token for word in named for token in word.tokens] == vectors
    for word in named:
        assert len({entries[token][2] for token in word.tokens}) == 1


def test_a_textual_inversion_is_found_with_and_without_its_extension(inversions):
    prompt = read(clip_with(inversions), "a embedding:three.pt cat, embedding:one", "source")
    assert prompt.find("embedding:three") == prompt.find("embedding:Three.pt") == (2, 3, 4)
    assert prompt.find("embedding:one.safetensors") == prompt.find("(embedding:one:1.2)") == (7,)


def test_a_textual_inversion_over_the_border_of_chunks_keeps_its_maps(inversions):
    clip = clip_with(inversions)
    left = read(clip, "cat " * 70 + "embedding:Twelve", "source")
    right = read(clip, "cat " * 72 + "embedding:Twelve", "target")
    mapping, _ = token_mapping(left, right, align(left, right, "auto"))
    rows, columns = (list(prompt.find("embedding:twelve")) for prompt in (left, right))
    assert len(rows) == 12 and rows != columns
    assert torch.equal(mapping[rows][:, columns], torch.eye(12))


def test_a_textual_inversion_is_swapped_like_a_word(inversions):
    clip = clip_with(inversions)
    left, right = read(clip, "a embedding:three", "source"), read(clip, "a cat", "target")
    mapping, _ = token_mapping(left, right, align(left, right, "auto"))
    assert mapping[:, 2].nonzero().flatten().tolist() == [2, 3, 4] and mapping[2, 2] == 1
    mapping, _ = token_mapping(right, left, align(right, left, "auto"))
    assert torch.allclose(mapping[2, 2:5], torch.tensor(1 / 3))


def test_a_textual_inversion_without_a_file_is_named_in_the_alignment(inversions):
    """The host leaves it out with a warning in its log."""
    clip = clip_with(inversions)
    left, right = read(clip, "a cat", "source"), read(clip, "a embedding:lost cat", "target")
    assert right.missing == ("embedding:lost",)
    shown = alignment_data(left, right, align(left, right, "auto"))["description"]
    assert shown.splitlines() == ["a cat (shared)", "! embedding:lost (no such file, left out)"]
    with pytest.raises(ValueError, match="no word"):
        read(clip, "embedding:lost", "target")


def test_without_a_folder_of_textual_inversions_their_names_are_text():
    prompt = read(SD1, "a embedding:one cat", "source")
    assert words_of(prompt) == ["a", "embedding", ":", "one", "cat"] and prompt.missing == ()


@pytest.mark.parametrize("text", ["a cat, embedding: ", "embedding:", "embedding:, a cat"])
def test_a_textual_inversion_without_a_name_is_refused(inversions, text):
    with pytest.raises(ValueError, match='"embedding:" without a name'):
        read(clip_with(inversions), text, "target")


def test_a_textual_inversion_for_another_text_encoder_is_refused(inversions):
    """The host leaves it out while it encodes, and all words behind it move to other positions."""
    with pytest.raises(ValueError, match="embedding:other.*1024 numbers.*encoder l .*768"):
        read(clip_with(inversions), "a embedding:other cat", "target")
    with pytest.raises(ValueError, match="embedding:one.*768 numbers.*encoder g .*1280"):
        read(clip_with(inversions, comfy.sdxl_clip.SDXLTokenizer), "a embedding:one cat", "target")
    sd2 = clip_with(inversions, comfy.text_encoders.sd2_clip.SD2Tokenizer)
    assert words_of(read(sd2, "a embedding:other cat", "target")) == ["a", "embedding:other", "cat"]


def test_textual_inversions_for_both_encoders_of_sdxl(inversions):
    clip = clip_with(inversions, comfy.sdxl_clip.SDXLTokenizer)
    prompt = read(clip, "a embedding:both cat", "source")
    assert prompt.find("embedding:both") == (2, 3, 4, 5) and prompt.find("cat") == (6,)
    with pytest.raises(ValueError, match="different numbers of vectors.*embedding:uneven"):
        read(clip, "a embedding:uneven cat", "source")


def test_many_textual_inversions_are_read_in_linear_time(inversions, monkeypatch):
    clip, vector = clip_with(inversions), torch.zeros(768)
    vectors = [(vector, 1.0, n // 2) for n in range(100_000)]
    tokenized = {"l": [[(49406, 1.0, 0), *vectors, (49407, 1.0, 0)]]}
    monkeypatch.setattr(clip, "tokenize", lambda *_, **__: tokenized)
    assert words_of(read(clip, "a cat", "source")) == ["embedding:"] * 50_000


# Whole runs


@pytest.fixture(scope="module")
def reader(studio, tmp_path_factory):
    """The bundled model with a textual inversion of three vectors, `embedding:mine`."""
    folder = tmp_path_factory.mktemp("runs")
    vectors = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    torch.save({"emb_params": vectors}, folder / "mine.pt")
    clip = studio.clip.clone()
    clip.tokenizer = comfy.sd1_clip.SD1Tokenizer(embedding_directory=str(folder))
    clip.tokenizer.clip_l.embedding_size = 128
    with torch.inference_mode():
        return Studio(studio.model, clip)


RUNS = {
    "tags that moved": ("cat, red hat, beach, snowy", "snowy, cat, blue hat, beach, castle"),
    "chunks": ("cat, " * 20 + "red hat", "cat, " * 60 + "(blue hat:1.2), car"),
    "a segment moved whole": ("cat " * 73 + "very red castle", "cat " * 73 + "(very red castle:1.2)"),
    "weights": ("a cat on a beach", "a ((dog)) on a (snowy (beach:0.7):1.2)"),
    "a textual inversion": ("a cat on a beach", "a (embedding:mine:1.2) on a beach, embedding:lost"),
    "two textual inversions": ("embedding:mine, beach", "car, embedding:mine, beach, embedding:mine"),
    "other writing": ("\u8d64\u3044 cat, \u043a\u043e\u0442", "\u767d\u3044 dog, \uace0\uc591 \U0001f436"),
    "empty parts": (", a cat,, beach", "a dog, ,beach,"),
}
runs = pytest.mark.parametrize(("source", "target"), RUNS.values(), ids=RUNS.keys())


@runs
def test_the_laws_hold_for_real_prompts(reader, source, target):
    """1: equal prompts, equal images. 2: tau empty, plain runs. 3: the source never changes."""
    edit = reader.edit(source, source, target)
    found, (same, edited) = reader.paired(edit, PART)
    assert_close(same[None], found)
    plain_source, (_, plain_target) = reader.paired(edit, EMPTY)
    assert torch.equal(found, plain_source)
    assert_close(plain_source, reader.plain(source))
    assert_close(plain_target[None], reader.plain(target))
    assert difference(edited[None], plain_target[None]) > EDITED / 10


@runs
def test_fused_equals_materialised_for_real_prompts(reader, source, target):
    edit = reader.edit(source, target)
    tau = TauSchedule(Window(0, 0.8), Window(0, 0))
    for found, expected in zip(
        reader.paired(edit, tau), naive_run(reader, edit, tau, Settings(), empty()), strict=True
    ):
        assert_close(found, expected)


# The page for people


@pytest.fixture(scope="module")
def page_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    torch.save({"emb_params": torch.randn(3, 768)}, folder / "mystyle.pt")
    return clip_with(str(folder))


PAGE = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```alignment\nsource: (.*)\ntarget: (.*)\nmode: (.*)\n\n((?:.+\n)+)```", PAGE)


@pytest.mark.parametrize(("source", "target", "mode", "description"), EXAMPLES)
def test_examples_of_the_docs_are_what_the_node_shows(page_clip, source, target, mode, description):
    left, right = read(page_clip, source, "source"), read(page_clip, target, "target")
    assert alignment_data(left, right, align(left, right, mode))["description"] + "\n" == description


def test_all_examples_of_the_docs_are_checked():
    assert len(EXAMPLES) == PAGE.count("```alignment") > 10
