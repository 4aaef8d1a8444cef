"""Prompts of models whose text encoders have other vocabularies than CLIP's, or several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from comfy import sd1_clip

from ..attention.prompt import Chunk, Prompt
from ..attention.vocabulary import PROBE, Letters, Piece, common_words, folded, inside, spelled, spelling_of


@dataclass(frozen=True)
class Part:
    """A text encoder whose tokens the network's attention sees.

    key: of its tokens in `clip.tokenize`. features: where the conditioning holds what it gave, "" for the
    conditioning itself. axis: of the tokens there. width: tokens to which the host's model pads. front: on
    the left. adapted: the features get to these tokens in the network alone, from those of another encoder.
    """

    key: str
    features: str = ""
    axis: int = 1
    width: int = 0
    front: bool = False
    adapted: bool = False


LLAMA = Part("llama", "conditioning_llama3", 2)
ENCODERS: dict[frozenset[str], tuple[Part, ...]] = {
    frozenset({"l", "t5xxl"}): (Part("t5xxl"),),
    frozenset({"l", "g", "t5xxl"}): (Part("l"), Part("t5xxl")),
    frozenset({"l", "g", "t5xxl", "llama"}): (Part("t5xxl"), LLAMA, LLAMA),
    frozenset({"l", "qwen25_7b"}): (Part("qwen25_7b"),),
    frozenset({"mistral3_24b"}): (Part("mistral3_24b", width=512, front=True),),
    frozenset({"qwen3_06b", "t5xxl"}): (Part("t5xxl", width=512, adapted=True),),
    frozenset({"hydit_clip", "mt5xl"}): (Part("hydit_clip"), Part("mt5xl", "conditioning_mt5xl")),
}
ENCODERS |= {
    frozenset({key}): (Part(key),)
    for key in (
        *("t5xxl", "pile_t5xl", "umt5xxl", "gemma2_2b", "gemma3_4b", "ministral3_3b"),
        *("qwen25_7b", "qwen25_3b", "qwen3_4b", "qwen3_8b", "qwen3_2b", "qwen3vl_4b", "qwen3vl_8b"),
    )
}
"""By the keys of `clip.tokenize`: the parts of the text as families of transformers name them, in order.

Flux; SD3; HiDream; Kandinsky 5; Flux.2; Anima, whose adapter writes to T5's tokens; HunyuanDiT; and models
with one encoder: Chroma, PixArt, Cosmos, AuraFlow, Wan, Lumina 2, Qwen-Image, Z-Image and their kin.
"""
OTHERWISE = ("LongCatImageTokenizer",)
"""Tokenizers under one of those keys whose tokens become features in another order or number."""

MODELS = (
    "SD1.x, SD2.x, SDXL, SD3, Flux, Flux.2, Chroma, Qwen-Image, Z-Image, Lumina 2, OmniGen2, AuraFlow, "
    "HiDream, PixArt, HunyuanDiT, Cosmos Predict2, Anima, Wan and Kandinsky 5"
)


@dataclass(frozen=True)
class Given:
    """What one of the host's tokenizers was given.

    tokenizer: it, a `comfy.sd1_clip.SDTokenizer`. text: with the template. plain: whether weights in
    parentheses are text to it. looked_up: names of textual inversions, in order, and whether there is a file.
    """

    tokenizer: Any
    text: str
    plain: bool
    looked_up: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Stream:
    """A text encoder's tokens: the letters of the prompt, and where the chunks lie, from 0."""

    letters: Letters
    chunks: tuple[Chunk, ...]

    @property
    def length(self) -> int:
        return self.chunks[-1].stop

    def as_features(self, dropped: int, part: Part) -> Stream:
        """The stream without its first tokens, padded as the host's model does."""
        kept = self.length - dropped
        width = max(part.width, kept)
        low = width - kept if part.front else 0

        def moved(place: int) -> int:
            return max(place - dropped, 0) + low

        tokens = (tuple(moved(t) for t in owners if t >= dropped) for owners in self.letters.tokens)
        chunks = [chunk.moved(moved) for chunk in self.chunks]
        chunks[0] = replace(chunks[0], begin=0)
        chunks[-1] = replace(chunks[-1], stop=width)
        return Stream(replace(self.letters, tokens=tuple(tokens)), tuple(chunks))


def parts_of(clip: Any, keys: Sequence[str]) -> tuple[Part, ...]:
    """The parts of a CLIP object's text. Raises ValueError for one that is not known."""
    parts = ENCODERS.get(frozenset(keys))
    if parts is None or type(clip.tokenizer).__name__ in OTHERWISE:
        raise ValueError(
            f"The text encoder gives tokens for {', '.join(keys)}, which Prompt-to-Prompt cannot read; it "
            f"reads those of {MODELS}. Connect the CLIP of such a model."
        )
    model = getattr(clip, "cond_stage_model", None)
    return tuple(part for part in parts if part.features or _has(model, part.key)) or parts


def _has(model: Any, key: str) -> bool:
    """Whether a text encoder of several was loaded; CLIP L and G give one part."""
    names = ("clip_l", "clip_g") if key == "l" else (key,)
    return any(getattr(model, name, True) is not None for name in names)


def read_streams(
    text: str,
    parts: Sequence[Part],
    entries: Mapping[str, list],
    given: Mapping[str, Given],
    templates: Mapping[str, tuple[str, str]],
    conditioning: Sequence = (),
) -> Prompt:
    """The words of a prompt, with their tokens where the network's attention has them.

    Encoders leave out a template's first tokens: as many as the features are fewer than the tokens.

    entries, given, templates: by encoder: the host's tokens (token, weight, word) by chunk; what its
    tokenizer was given; the text before and behind the prompt. conditioning: the host's, of this prompt;
    without one nothing counts as left out.
    Raises ValueError for a tokenizer that does not read text as its vocabulary spells it.
    """
    plain_text = as_read(text, given[parts[0].key].plain)
    streams: list[Stream] = []
    for part in parts:
        stream = _stream(part.key, entries[part.key], given[part.key], templates[part.key])
        features = _features(part, parts, conditioning)
        dropped = 0 if features is None else max(stream.length - features, 0)
        streams.append(stream.as_features(dropped, part))
    return _side_by_side(text, plain_text, streams)


def _features(part: Part, parts: Sequence[Part], conditioning: Sequence) -> int | None:
    """The number of a part's tokens in the conditioning, if it stands there alone and as it is."""
    alone = sum(other.features == part.features for other in set(parts)) == 1
    if not conditioning or not alone or part.adapted:
        return None
    features, more = conditioning[0]
    found = more.get(part.features) if part.features else features
    return None if found is None else found.shape[part.axis]


def as_read(text: str, plain: bool) -> str:
    """A text without weights and escapes, as the host's tokenizers read it."""
    escaped = sd1_clip.escape_important(text)
    segments = [escaped] if plain else [segment for segment, _ in sd1_clip.token_weights(escaped, 1.0)]
    return "".join(map(sd1_clip.unescape_important, segments))


def _stream(key: str, chunks: list, given: Given, template: tuple[str, str]) -> Stream:
    """The tokens of one text encoder."""
    spelling = _spelling(key, given.tokenizer)
    names = (name for name, found in given.looked_up if found)
    pieces: list[Piece] = []
    bounds: list[tuple[int, int, int]] = []
    offset = inversion = 0
    for chunk in chunks:
        first, end = _between(chunk, given.tokenizer)
        for position, (token, _, word) in enumerate(chunk[first:end], offset + first):
            if not torch.is_tensor(token):
                pieces.append((spelling(given.tokenizer.inv_vocab.get(token, "")), (position,)))
            elif word == inversion:
                pieces[-1] = (pieces[-1][0], (*pieces[-1][1], position))
            else:
                pieces.append((next(names, "embedding:").encode(), (position,)))
            inversion = word if torch.is_tensor(token) else 0
        bounds.append((offset + first, offset + end, offset + len(chunk)))
        offset += len(chunk)
    letters = folded(inside(spelled(pieces), *template))
    return Stream(letters, _chunks(letters, bounds, given.tokenizer))


def _between(chunk: list, tokenizer: Any) -> tuple[int, int]:
    """Where the tokens of the text begin and end in a chunk: between start, end and padding, of no word."""
    of_text = [n for n, entry in enumerate(chunk) if entry[2] != 0]
    if of_text:
        return of_text[0], of_text[-1] + 1
    start = int(tokenizer.start_token is not None)
    return start, start


def _chunks(letters: Letters, bounds: list[tuple[int, int, int]], tokenizer: Any) -> tuple[Chunk, ...]:
    """Where chunks lie. bounds: where the tokenizer's text begins and ends, and the chunk ends, of each."""
    owned = sorted({token for tokens in letters.tokens for token in tokens})
    starts, ends = (int(token is not None) for token in (tokenizer.start_token, tokenizer.end_token))
    found: list[Chunk] = []
    begin = 0
    for first, end, stop in bounds:
        words = [token for token in owned if first <= token < end]
        ahead, behind = (words[0], words[-1] + 1) if words else (first, first)
        padding = min(end + ends, stop)
        found.append(Chunk(begin, max(first - starts, begin), ahead, behind, padding, stop))
        begin = stop
    return tuple(found)


def _spelling(key: str, tokenizer: Any) -> Callable[[str], bytes]:
    """How a tokenizer's vocabulary is spelled. Raises ValueError if it reads a text that is not there."""
    stop = -1 if tokenizer.tokenizer_adds_end_token else None
    tokens = tokenizer.tokenizer(PROBE)["input_ids"][tokenizer.tokens_start : stop]
    pieces = [tokenizer.inv_vocab.get(token, "") for token in tokens]
    spelling = spelling_of(pieces)
    if spelling is None:
        raise ValueError(
            f'The tokenizer of the text encoder {key} reads "{PROBE}" as "{" | ".join(pieces)}": this '
            "ComfyUI does not load it rightly with the installed transformers package, and its images would "
            "not follow the prompt. Update ComfyUI."
        )
    return spelling


def _side_by_side(text: str, plain_text: str, streams: Sequence[Stream]) -> Prompt:
    """The prompt of all its streams, one behind the other."""
    offsets = list(accumulate((stream.length for stream in streams), initial=0))
    words = common_words(plain_text, [stream.letters for stream in streams], offsets[:-1])
    chunks = [
        replace(chunk.moved(offset.__add__), stream=number)
        for number, (stream, offset) in enumerate(zip(streams, offsets, strict=False))
        for chunk in stream.chunks
    ]
    return Prompt(text, words, tuple(chunks))
