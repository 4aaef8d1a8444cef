"""Prompts of transformers with ComfyUI's own tokenizers: words, and where tokens lie among the features."""

from __future__ import annotations

import importlib
import io
from functools import cache, partial
from importlib.util import find_spec

import comfy.text_encoders.aura_t5
import comfy.text_encoders.cosmos
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.hydit
import comfy.text_encoders.lumina2
import comfy.text_encoders.omnigen2
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.text_encoders.z_image
import pytest
import sentencepiece
import torch
from comfy import sd1_clip
from p2p.attention.alignment import align, token_mapping
from p2p.attention.vocabulary import PROBE, fold
from p2p.nodes.page import alignment_data
from p2p.sampling.encode import encode, start_edit
from p2p.sampling.streams import Part, Stream, folded, parts_of

te = comfy.text_encoders


class Encoder:
    """A text encoder that gives zeros: as many features as it got tokens. masked: whether it gives a mask."""

    def __init__(self, width=8, masked=False):
        self.width, self.masked = width, masked

    def encode_token_weights(self, chunks):
        length = sum(map(len, chunks))
        given = torch.zeros(1, length, self.width), torch.zeros(1, 8)
        return (*given, {"attention_mask": torch.ones(1, length)}) if self.masked else given


class Layers(Encoder):
    """One that gives the features of several layers."""

    def __init__(self, layers, width=8):
        super().__init__(width)
        self.layers = layers

    def encode_token_weights(self, chunks):
        features, pooled, *_ = super().encode_token_weights(chunks)
        return features[:, None].expand(-1, self.layers, -1, -1), pooled, {}


class Clip:
    """The host's tokenizer, and the host's way from features to conditioning, as a CLIP object."""

    def __init__(self, tokenizer, model, **encoders):
        self.tokenizer = tokenizer
        self.cond_stage_model = model.__new__(model)
        name = next(iter(encoders))
        self.cond_stage_model.__dict__ |= {"clip_name": name, "clip": name, "t5_attention_mask": False}
        self.cond_stage_model.__dict__ |= encoders

    def tokenize(self, text, return_word_ids=False, **options):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids, **options)

    def encode_from_tokens_scheduled(self, tokens):
        features, pooled, *more = self.cond_stage_model.encode_token_weights(tokens)
        return [[features, {"pooled_output": pooled, **(more[0] if more else {})}]]


@cache
def spiece():
    """A small vocabulary of the kind that text encoders' files bring along (Gemma, UMT5, mT5)."""
    model = io.BytesIO()
    text = [PROBE, "a photo of a red dog, in the snow", "Big cats and lions on a mat.", *["cat mat dog"] * 3]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=model,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def one(tokenizer, name, model=sd1_clip.SD1ClipModel):
    return Clip(tokenizer, model, **{name: Encoder(masked=True)})


def three(**missing):
    encoders = {"clip_l": Encoder(), "clip_g": Encoder(), "t5xxl": Encoder(4096)} | missing
    return Clip(te.sd3_clip.SD3Tokenizer(), te.sd3_clip.SD3ClipModel, **encoders)


def hydit():
    tokenizer = te.hydit.HyditTokenizer(tokenizer_data={"mt5xl.spiece_model": spiece()})
    masked = Encoder(masked=True)
    return Clip(tokenizer, te.hydit.HyditModel, hydit_clip=masked, mt5xl=masked)


MADE = {
    "Flux": lambda: Clip(te.flux.FluxTokenizer(), te.flux.FluxClipModel, clip_l=Encoder(), t5xxl=Encoder()),
    "SD3": three,
    "SD3 without T5": lambda: three(t5xxl=None),
    "SD3 without CLIP": lambda: three(clip_l=None, clip_g=None),
    "Chroma, PixArt": lambda: one(te.pixart_t5.PixArtTokenizer(), "t5xxl"),
    "AuraFlow": lambda: one(te.aura_t5.AuraT5Tokenizer(), "pile_t5xl"),
    "Cosmos": lambda: one(te.cosmos.CosmosT5Tokenizer(), "t5xxl"),
    "Qwen-Image": lambda: one(
        te.qwen_image.QwenImageTokenizer(), "qwen25_7b", te.qwen_image.QwenImageTEModel
    ),
    "Z-Image": lambda: one(te.z_image.ZImageTokenizer(), "qwen3_4b"),
    "OmniGen2": lambda: one(te.omnigen2.Omnigen2Tokenizer(), "qwen25_3b"),
    "Lumina 2": lambda: one(
        te.lumina2.LuminaTokenizer(tokenizer_data={"spiece_model": spiece()}), "gemma2_2b"
    ),
    "Wan": lambda: one(te.wan.WanT5Tokenizer(tokenizer_data={"spiece_model": spiece()}), "umt5xxl"),
    "HunyuanDiT": hydit,
}
if hasattr(te.flux, "KleinTokenizer"):
    MADE["Flux.2 Klein"] = lambda: Clip(te.flux.KleinTokenizer(), te.flux.Flux2TEModel, qwen3_4b=Layers(3))
NEWER = {
    "Anima": ("anima", "AnimaTokenizer", "AnimaTEModel", {"qwen3_06b": lambda: Encoder(masked=True)}),
    "Ovis-Image": ("ovis", "OvisTokenizer", "OvisTEModel", {"qwen3_2b": Encoder}),
    "Kandinsky 5 Image": (
        "kandinsky5",
        "Kandinsky5TokenizerImage",
        "Kandinsky5TEModel",
        {"qwen25_7b": lambda: Encoder(masked=True), "clip_l": Encoder},
    ),
    "Krea 2": ("krea2", "Krea2Tokenizer", "Krea2TEModel", {"qwen3vl_4b": lambda: Layers(2)}),
    "Ideogram 4": ("ideogram4", "Ideogram4Tokenizer", "Ideogram4TEModel", {"qwen3vl_8b": lambda: Layers(2)}),
    "JoyImage": (
        "joyimage",
        "JoyImageTokenizer",
        "JoyImageTEModel",
        {"qwen3vl_8b": lambda: Encoder(masked=True)},
    ),
    "Mage-Flow": (
        "mage_flow",
        "MageFlowTokenizer",
        "MageFlowTEModel",
        {"qwen3vl_4b": lambda: Encoder(masked=True)},
    ),
    "Boogu": ("boogu", "BooguTokenizer", "BooguTEModel", {"qwen3vl_8b": lambda: Encoder(masked=True)}),
}
"""Of later hosts: module, tokenizer, text encoder, and what gives its features."""


def newer(name):
    module, tokenizer, model, encoders = NEWER[name]
    found = importlib.import_module(f"comfy.text_encoders.{module}")
    made = {key: make() for key, make in encoders.items()}
    return Clip(getattr(found, tokenizer)(), getattr(found, model), **made)


MADE |= {
    name: partial(newer, name)
    for name, (module, *_) in NEWER.items()
    if find_spec(f"comfy.text_encoders.{module}")
}
FIRST = {"Qwen-Image": 0, "Z-Image": 3, "OmniGen2": 23, "Lumina 2": 1, "HunyuanDiT": 1, "SD3": 1}
"""Where a prompt's first token lies, if not at 0: behind the kept part of a template, or a start token."""
FIRST |= {"SD3 without T5": 1, "Flux.2 Klein": 3, "Ovis-Image": 1, "Ideogram 4": 3, "JoyImage": 2}
FIRST["Boogu"] = 29
READS_CHINESE = ("AuraFlow", "Qwen-Image", "Z-Image", "OmniGen2", "Lumina 2", "Wan")
every_family = pytest.mark.parametrize("family", MADE)


@cache
def clip_of(family):
    return MADE[family]()


def read(family, text):
    return encode(clip_of(family), text, "source")


def words_of(family, text):
    return [word.text for word in read(family, text).words]


@every_family
def test_the_length_is_that_of_the_features(family):
    prompt = read(family, "a red cat on a mat")
    features, more = prompt.conditioning[0]
    if family == "Anima":  # its network writes the features to the tokens of T5
        assert prompt.length == 512
        return
    assert prompt.length == features.shape[1] + more.get("conditioning_mt5xl", features[:, :0]).shape[1]
    assert [chunk.begin for chunk in prompt.chunks[1:]] == [chunk.stop for chunk in prompt.chunks[:-1]]


@every_family
def test_tokens_of_words_follow_each_other_from_the_first_of_the_prompt_on(family):
    prompt = read(family, "A red Cat, on a big mat.")
    assert prompt.words[0].tokens[0] == FIRST.get(family, 0)
    for chunk in prompt.chunks:
        inside = sorted(
            token for word in prompt.words for token in word.tokens if chunk.begin <= token < chunk.stop
        )
        assert inside == list(range(chunk.first, chunk.end))


@every_family
def test_words_are_the_same_whatever_the_text_encoder(family):
    expected = ["a", "cat", "'s", "hat", ",", "don", "'t", "!", "35", "mm", "photo"]
    assert words_of(family, "A Cat's hat, don't!  35mm photo") == expected


@every_family
@pytest.mark.parametrize(
    ("source", "target", "mode", "swapped", "new"),
    [
        ("a cat riding a bicycle", "a dog riding a bicycle", "auto", [("cat", "dog")], []),
        ("a house in the snow", "a big red house in the snow", "auto", [], ["big", "red"]),
        ("a cat on a mat", "a lion on a mat", "refine", [], ["lion"]),
        (
            "a photo of a cat",
            "a watercolour painting of a cat",
            "auto",
            [("photo", "watercolour painting")],
            [],
        ),
        ("1girl, red hat, smile", "1girl, blue hat, smile", "auto", [("red", "blue")], []),
    ],
)
def test_pairs_are_aligned_on_every_vocabulary(family, source, target, mode, swapped, new):
    left, right = read(family, source), read(family, target)
    alignment = align(left, right, mode)

    def text(prompt, words):
        return " ".join(prompt.words[word].text for word in words)

    assert [(text(left, p.source), text(right, p.target)) for p in alignment.pairings if p.swapped] == swapped
    assert [right.words[word].text for word in alignment.new] == new
    mapping, inherits = token_mapping(left, right, alignment)
    assert mapping.shape == (left.length, right.length)
    own = {token for word in alignment.new for token in right.words[word].tokens}
    assert {n for n, value in enumerate(inherits.tolist()) if value == 0} == own
    for chunk in right.chunks:  # no token takes a map of another text encoder's
        origin = left.stream(chunk.stream)
        rows = mapping[:, chunk.begin : chunk.stop].any(1).nonzero().flatten()
        assert origin[0].begin <= rows.min() and rows.max() < origin[-1].stop


@every_family
def test_equal_prompts_map_every_token_to_itself(family):
    prompt = read(family, "a red cat, on a mat")
    mapping, inherits = token_mapping(prompt, prompt, align(prompt, prompt, "auto"))
    assert torch.equal(mapping, torch.eye(prompt.length)) and bool(inherits.all())


@pytest.mark.parametrize("family", READS_CHINESE)
def test_chinese_words_are_swapped(family):
    edit = start_edit(clip_of(family), "\u4e00\u53ea\u732b", "\u4e00\u53ea\u72d7", "auto")
    (target,) = edit.targets
    assert target.alignment.describe(edit.source.prompt, target.prompt).endswith("\u732b -> \u72d7 (swapped)")


def test_japanese_is_read_by_characters_where_tokens_allow():
    text = "\u9ed2\u3044\u732b\u3001\u72ac\u306e\u5199\u771f"
    assert "".join(words_of("AuraFlow", text)) == text
    assert words_of("AuraFlow", text) == list(text)
    assert {"\u732b", "\u3001", "\u72ac"} <= set(words_of("Qwen-Image", text))


def test_tokens_of_a_word_spell_it():
    clip, text = clip_of("Z-Image"), "a Lion in caf\u00e9s, black-and-white \U0001f389"
    (entries,) = clip.tokenize(text).values()
    vocabulary = clip.tokenizer.qwen3_4b.tokenizer
    for word in read("Z-Image", text).words:
        assert fold(vocabulary.decode([entries[0][token][0] for token in word.tokens])) == fold(word.text)


@pytest.mark.parametrize(
    ("family", "plain"), [("Qwen-Image", True), ("Z-Image", True), ("Flux", False), ("SD3", False)]
)
def test_weights_are_words_where_the_text_encoder_takes_them_as_text(family, plain):
    edit = start_edit(clip_of(family), "a cat", "a (red:1.2) cat", "auto")
    words = [word.text for word in edit.targets[0].prompt.words]
    assert words == (["a", "(", "red", ":", "1", ".", "2", ")", "cat"] if plain else ["a", "red", "cat"])
    said = alignment_data(*edit.prompts, edit.targets[0].alignment)["description"]
    assert ("plain text" in said) == plain


def test_a_prompt_of_two_windows_keeps_both_text_encoders_apart():
    long = read("SD3", " ".join(["a red cat on a mat"] * 15))
    assert [(chunk.begin, chunk.stop, chunk.stream) for chunk in long.chunks[:2]] == [
        (0, 77, 0),
        (77, 154, 0),
    ]
    assert all({token < 154 for token in word.tokens} == {True, False} for word in long.words)
    short = read("SD3", "a red cat on a mat")
    mapping, inherits = token_mapping(short, long, align(short, long, "refine"))
    assert not mapping[:77, 154:].any() and not mapping[77:, :154].any()


def test_features_padded_at_the_front_move_the_words_behind_the_padding():
    prompt = read("Z-Image", "a cat")
    stream = Stream(folded([("a", (3,)), ("b", (4,))]), prompt.chunks)
    moved = stream.as_features(0, Part("", width=20, front=True))
    shift = 20 - prompt.length
    assert moved.length == 20 and moved.letters.tokens == ((3 + shift,), (4 + shift,))
    assert (moved.chunks[0].begin, moved.chunks[0].start) == (0, shift)


def test_hidream_has_three_parts_or_says_why_it_cannot_be_read():
    encoders = {"clip_l": Encoder(), "clip_g": Encoder(), "t5xxl": Encoder(), "llama": Layers(4)}
    clip = Clip(te.hidream.HiDreamTokenizer(), te.hidream.HiDreamTEModel, **encoders)
    if (
        clip.tokenizer.llama.tokenizer.decode(clip.tokenizer.llama.tokenizer("a cat")["input_ids"][1:])
        != "a cat"
    ):
        with pytest.raises(ValueError, match=r"tokenizer of the text encoder llama.*Update ComfyUI"):
            encode(clip, "a cat", "source")
        return
    prompt = encode(clip, "a cat", "source")
    assert prompt.length == 3 * 128 and [chunk.stream for chunk in prompt.chunks] == [0, 1, 2]
    assert [word.tokens[-2:] for word in prompt.words] == [(129, 257), (130, 258)]


def test_an_unknown_text_encoder_is_refused_with_its_keys():
    clip = one(te.pixart_t5.PixArtTokenizer(), "t5xxl")
    with pytest.raises(ValueError, match="tokens for mystery, .*Flux.*Connect the CLIP"):
        parts_of(clip, ["mystery"])
