"""Words, tokens and alignment with ComfyUI's own tokenizers."""

from __future__ import annotations

import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import pytest
import torch
from p2p.attention.alignment import align, token_mapping
from p2p.sampling.encode import encode, start_edit


class Clip:
    """A CLIP object as far as words are concerned: the tokenizer of a model class, no encoder."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize(self, text, return_word_ids=False, **options):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **options)

    def encode_from_tokens_scheduled(self, tokens):
        return []


SD1 = Clip(comfy.sd1_clip.SD1Tokenizer())
SD2 = Clip(comfy.text_encoders.sd2_clip.SD2Tokenizer())
SDXL = Clip(comfy.sdxl_clip.SDXLTokenizer())
CLIPS = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}
clips = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())


def prompt_of(text, clip=SD1):
    return encode(clip, text, "source")


def chunks_of(text, clip):
    """The host's own token list, of the encoder that words are read from."""
    tokens = clip.tokenize(text)
    return tokens["l" if "l" in tokens else "h"]


def words_of(text, clip=SD1):
    return [word.text for word in prompt_of(text, clip).words]


@clips
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat riding a bicycle", ["a", "cat", "riding", "a", "bicycle"]),
        ("A Cat,  a HAT", ["a", "cat", ",", "a", "hat"]),
        ("a cat's hat, don't!", ["a", "cat", "'s", "hat", ",", "don", "'t", "!"]),
        ("a (red:1.3) ((big)) [cat]", ["a", "red", "big", "[", "cat", "]"]),
        (r"a cat \(sitting\)", ["a", "cat", "(", "sitting", ")"]),
        ("black-and-white", ["black", "-", "and", "-", "white"]),
        ("35mm f/1.8", ["3", "5", "mm", "f", "/", "1", ".", "8"]),
        ("caf\u00e9 na\u00efve", ["caf\u00e9", "na\u00efve"]),
        ("a \U0001f389 party", ["a", "\U0001f389", "party"]),
        ("antidisestablishmentarianism cat", ["antidisestablishmentarianism", "cat"]),
    ],
)
def test_words_are_read_from_the_vocabulary_of_every_model_class(clip, text, words):
    assert words_of(text, clip) == words


@clips
def test_tokens_are_the_positions_in_the_hosts_token_list(clip):
    text = "a (photograph:1.2) of antidisestablishmentarianism, \U0001f389"
    prompt = prompt_of(text, clip)
    (tokens,) = chunks_of(text, clip)
    assert prompt.length == len(tokens) == 77
    covered = sorted(token for word in prompt.words for token in word.tokens)
    assert covered == list(range(1, prompt.chunks[0].end))
    assert int(tokens[prompt.chunks[0].end][0]) == 49407


def test_the_two_encoders_of_sdxl_agree_on_every_position():
    text = "a (photograph:1.2) of antidisestablishmentarianism, \U0001f389 " + "red cat, " * 40
    tokens = SDXL.tokenize(text)
    for left, right in zip(tokens["l"], tokens["g"], strict=True):
        end = [int(token[0]) for token in left].index(49407)
        assert [int(token[0]) for token in left][: end + 1] == [int(token[0]) for token in right][: end + 1]


@clips
@pytest.mark.parametrize("count", [30, 40, 75, 76, 100, 160])
def test_long_prompts_are_read_over_the_borders_of_chunks(clip, count):
    words = [("cat", "red", "castle", "antidisestablishmentarianism")[n % 4] for n in range(count)]
    prompt = prompt_of(" ".join(words), clip)
    assert [word.text for word in prompt.words] == words
    chunks = chunks_of(" ".join(words), clip)
    assert prompt.length == 77 * len(chunks)
    flat = [int(token[0]) for chunk in chunks for token in chunk]
    for text in set(words):  # whatever chunk a word stands in, its tokens are the same
        ids = {tuple(flat[token] for token in word.tokens) for word in prompt.words if word.text == text}
        assert len(ids) == 1


def test_a_short_segment_that_moved_into_the_next_chunk_keeps_its_words():
    """Weighted segments of fewer than eight tokens are moved whole."""
    prompt = prompt_of("cat " * 72 + "(a very red castle:1.2) tree")
    assert prompt.length == 154
    castle = prompt.words[75]
    assert castle.text == "castle" and castle.tokens == (77 + 4,)
    assert [word.text for word in prompt.words[-5:]] == ["a", "very", "red", "castle", "tree"]


def test_a_textual_inversion_of_the_host_is_one_word_of_all_its_vectors(tmp_path):
    torch.save({"emb_params": torch.randn(3, 768)}, tmp_path / "mine.pt")
    clip = Clip(comfy.sd1_clip.SD1Tokenizer(embedding_directory=str(tmp_path)))
    prompt = prompt_of("a embedding:mine cat, embedding:mine", clip)
    assert [word.text for word in prompt.words] == ["a", "embedding:mine", "cat", ",", "embedding:mine"]
    assert [word.tokens for word in prompt.words] == [(1,), (2, 3, 4), (5,), (6,), (7, 8, 9)]
    assert prompt.find("embedding:mine#2") == (7, 8, 9)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
@pytest.mark.parametrize("role", ["source", "target"])
def test_an_empty_prompt_is_refused_with_its_role(text, role):
    with pytest.raises(ValueError, match=f"{role} prompt is empty"):
        encode(SD1, text, role)


# Real pairs


PAIRS = [
    # source, target, mode, swapped runs, new words, removed words
    ("a cat riding a bicycle", "a cat riding a car", "auto", [("bicycle", "car")], [], []),
    ("a cat riding a bicycle", "a cat riding a car", "swap", [("bicycle", "car")], [], []),
    ("a cat riding a bicycle", "a cat riding a car", "refine", [], ["car"], ["bicycle"]),
    ("a castle", "children drawing of a castle", "auto", [], ["children", "drawing", "of"], []),
    ("a castle", "a castle at night, snowy", "auto", [], ["at", "night", ",", "snowy"], []),
    ("a photo of a cat at night", "a cat", "auto", [], [], ["a", "photo", "of", "at", "night"]),
    ("a cat, on a mat.", "a dog, on a mat.", "auto", [("cat", "dog")], [], []),
    ("a cat on a mat", "a dog, on a mat", "auto", [("cat", "dog")], [","], []),
    ("a cat on a mat", "a cat, on a mat", "auto", [], [","], []),
    ("A Cat on a mat", "a cat on a Mat", "auto", [], [], []),
    ("the cat's hat", "the dog's hat", "auto", [("cat", "dog")], [], []),
    ("it isn't a cat", "it isn't a dog", "auto", [("cat", "dog")], [], []),
    ("a cat that doesn't sleep", "a cat that does sleep", "auto", [("doesn 't", "does")], [], []),
    ("a cat and a cat", "a cat and a dog", "auto", [("cat", "dog")], [], []),
    ("a cat and a dog", "a dog and a cat", "refine", None, None, None),
    ("a cat, a hat and a boat", "a dog, a hat and a car", "auto", [("cat", "dog"), ("boat", "car")], [], []),
    (
        "a cat riding a bicycle on a beach",
        "a fluffy dog riding a car on a snowy mountain",
        "auto",
        [("cat", "fluffy dog"), ("bicycle", "car"), ("beach", "snowy mountain")],
        [],
        [],
    ),
    (
        "photo of a house on a mountain",
        "a watercolour painting of a house on a mountain in fall",
        "auto",
        [("photo", "a watercolour painting")],
        ["in", "fall"],
        [],
    ),
    ("a (cat:1.3) riding a bicycle", "a cat riding a (bicycle:0.5)", "auto", [], [], []),
    ("a (fluffy:1.2) cat", "a (smooth:0.8) cat", "auto", [("fluffy", "smooth")], [], []),
    (
        "a antidisestablishmentarianism cat",
        "a red cat",
        "auto",
        [("antidisestablishmentarianism", "red")],
        [],
        [],
    ),
]


@pytest.mark.parametrize(("source", "target", "mode", "swapped", "new", "removed"), PAIRS)
def test_real_pairs(source, target, mode, swapped, new, removed):
    left, right = prompt_of(source), prompt_of(target)
    alignment = align(left, right, mode)

    def text(prompt, words):
        return " ".join(prompt.words[word].text for word in words)

    if swapped is None:  # words that changed places: three of the five can stay in order
        assert len(alignment.pairings) == 3 and not any(pairing.swapped for pairing in alignment.pairings)
        return
    assert [(text(left, p.source), text(right, p.target)) for p in alignment.pairings if p.swapped] == swapped
    assert [right.words[word].text for word in alignment.new] == new
    assert [left.words[word].text for word in alignment.removed] == removed


@pytest.mark.parametrize(("source", "target", "mode"), [pair[:3] for pair in PAIRS])
def test_shared_words_of_real_pairs_read_their_own_tokens(source, target, mode):
    """Among them all words after a swap of unequal length: the mistake of the published swap mapper."""
    left, right = prompt_of(source), prompt_of(target)
    alignment = align(left, right, mode)
    mapping, inherits = token_mapping(left, right, alignment)
    for pairing in alignment.pairings:
        if not pairing.swapped:
            rows, columns = left.words[pairing.source[0]].tokens, right.words[pairing.target[0]].tokens
            for row, column in zip(rows, columns, strict=True):
                assert mapping[:, column].nonzero().flatten().tolist() == [row]
                assert mapping[row, column] == 1 and inherits[column] == 1


def test_weights_are_stripped_before_alignment_and_kept_in_the_encoding(demo_model):
    _, clip, _ = demo_model
    plain = start_edit(clip, "a cat riding a bicycle", "a dog riding a bicycle", "auto")
    weighted = start_edit(clip, "a (cat:1.3) riding a bicycle", "a (dog:0.7) riding a (bicycle:1.2)", "auto")
    assert torch.equal(plain.targets[0].mapping, weighted.targets[0].mapping)
    assert torch.equal(plain.targets[0].inherits, weighted.targets[0].inherits)
    assert (weighted.targets[0].gain == 1).all()
    expected = clip.encode_from_tokens_scheduled(clip.tokenize("a (dog:0.7) riding a (bicycle:1.2)"))
    assert torch.equal(weighted.targets[0].prompt.conditioning[0][0], expected[0][0])
