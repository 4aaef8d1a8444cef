"""From text to prompts: ComfyUI's tokenizers and text encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..attention.edit import Edit, Source
from ..attention.prompt import WORD_END, Prompt, read_prompt, spell

EMBEDDING = "embedding:"
"""So the host's tokenizers mark the name of a textual inversion."""


def check_prompt(text: str, role: str) -> None:
    """Raise ValueError for an empty prompt; role is "source" or "target"."""
    if not text.strip():
        raise ValueError(f"The {role} prompt is empty; expected at least one word.")


def encode(clip: Any, text: str, role: str) -> tuple[Prompt, list]:
    """Tokenize and encode a prompt with a ComfyUI CLIP object.

    role: "source" or "target", for messages. Returns the prompt's words and the host's CONDITIONING.
    Raises ValueError for an empty prompt, for text encoders without CLIP's vocabulary, and for textual
    inversions that were made for another text encoder.
    """
    prompt = read(clip, text, role)
    return prompt, clip.encode_from_tokens_scheduled(clip.tokenize(text))


def read(clip: Any, text: str, role: str) -> Prompt:
    """The words of a prompt; raises what `encode` raises.

    clip: a ComfyUI CLIP object, of which only `tokenize` and `tokenizer` are used.
    """
    check_prompt(text, role)
    encoders, inversions = _tokenize(clip, text)
    pieces = _pieces(clip, encoders, [name for name, found in inversions if found])
    prompt = read_prompt(text, pieces, tuple(name for name, found in inversions if not found))
    if not prompt.words:
        raise ValueError(f'The {role} prompt "{text}" has no word that the text encoder reads.')
    return prompt


def start_edit(clip: Any, source: str, target: str, mode: str) -> Edit:
    """An edit of one source and one target prompt."""
    return _with_target(clip, Edit(Source(*encode(clip, source, "source"))), target, mode)


def add_target(clip: Any, edit: Edit, target: str, mode: str) -> Edit:
    """The edit with one more target.

    Raises ValueError for another text encoder than the source's: one that encodes the source differently.
    """
    before = edit.source.conditioning
    again = clip.encode_from_tokens_scheduled(clip.tokenize(edit.source.text))
    if len(again) != len(before) or not all(
        _alike(one, other) for (one, _), (other, _) in zip(again, before, strict=True)
    ):
        raise ValueError(
            "The clip is not the one that encoded the source prompt; connect the same CLIP, with the same "
            "LoRAs and clip skip, to Prompt Pair and Add Target."
        )
    return _with_target(clip, edit, target, mode)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two encodings are the same but for rounding."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.to(one.device, torch.float32)
    return bool((one - other).norm() <= 0.01 * other.norm())


def _with_target(clip: Any, edit: Edit, target: str, mode: str) -> Edit:
    prompt, conditioning = encode(clip, target, "target")
    return edit.with_target(prompt, mode, conditioning)


def _tokenize(clip: Any, text: str) -> tuple[dict, list[tuple[str, bool]]]:
    """The host's tokens of a text, by encoder, and the textual inversions that it names, in order.

    Which these are is for the host to say, whose versions read names differently: each name that its
    tokenizers look up, and whether one of them found a file.
    """
    looked_up: list[list[tuple[str, bool]]] = []
    clip = copy.copy(clip)
    clip.tokenizer = copy.copy(clip.tokenizer)
    for name, tokenizer in list(vars(clip.tokenizer).items()):
        if hasattr(tokenizer, "_try_get_embedding"):
            tokenizer = copy.copy(tokenizer)
            looked_up.append([])
            tokenizer._try_get_embedding = _noting(tokenizer._try_get_embedding, text, looked_up[-1])
            setattr(clip.tokenizer, name, tokenizer)
    encoders = clip.tokenize(text, return_word_ids=True)
    each = zip(*filter(None, looked_up), strict=False)
    return encoders, [(found[0][0], any(file for _, file in found)) for found in each]


def _noting(look_up: Callable[[str], tuple], text: str, noted: list[tuple[str, bool]]) -> Callable:
    """The host's look-up of a textual inversion, of which names and success are noted."""

    def noting(rest: str) -> tuple:
        """rest: the text from the name on. Later hosts give (vectors, name, text behind it)."""
        found = look_up(rest) if rest.strip() else (None, "", "")
        name = (found[1] if len(found) == 3 else rest.split()[0]).strip(",")
        if not name:
            raise ValueError(f'The prompt "{text}" has "{EMBEDDING}" without a name behind it.')
        noted.append((EMBEDDING + name, found[0] is not None))
        return found

    return noting


def _pieces(clip: Any, encoders: dict, inversions: list[str]) -> list[list[str]]:
    """The vocabulary's strings of a text's tokens, chunk by chunk; a textual inversion counts as one word.

    encoders: the text's tokens. inversions: the names of its textual inversions, in order.
    """
    name = next((name for name in ("l", "h", "g") if name in encoders), None)
    if name is None or set(encoders) - {"l", "g", "h"}:
        raise ValueError(
            f"The text encoder gives tokens for {', '.join(encoders)}; Prompt-to-Prompt works on models with "
            "CLIP text encoders and cross-attention (SD1.x, SD2.x, SDXL). Connect the CLIP of such a model."
        )
    layouts = [[[entry[2] for entry in chunk] for chunk in chunks] for chunks in encoders.values()]
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(
            f"The model's text encoders ({', '.join(encoders)}) get different numbers of vectors from the "
            f"textual inversions of the prompt ({', '.join(inversions)}); use files made for this model."
        )
    for encoder, chunks in encoders.items():
        _check_widths(clip, encoder, chunks, inversions)
    vectors = [entry[2] for chunk in encoders[name] for entry in chunk if torch.is_tensor(entry[0])]
    words = iter(_inversion_pieces(vectors, inversions))
    return [
        [
            next(words) if torch.is_tensor(token) else clip.tokenizer.untokenize([(token, weight)])[0][1]
            for token, weight, *_ in chunk
        ]
        for chunk in encoders[name]
    ]


def _inversion_pieces(words: list[int], inversions: list[str]) -> list[str]:
    """A piece for each vector: the name on an inversion's first one, the word's end on its last.

    words: which word of the prompt each vector belongs to.
    """
    pieces, names = [], iter(inversions)
    for n, word in enumerate(words):
        letters = spell(next(names, EMBEDDING)) if word not in words[:n] else ""
        pieces.append(letters + (WORD_END if word not in words[n + 1 :] else ""))
    return pieces


def _check_widths(clip: Any, encoder: str, chunks: list[list[tuple]], inversions: list[str]) -> None:
    """Raise ValueError for vectors that the host leaves out while it encodes: they do not fit."""
    expected = getattr(getattr(clip.tokenizer, f"clip_{encoder}", None), "embedding_size", None)
    widths = {entry[0].shape[-1] for chunk in chunks for entry in chunk if torch.is_tensor(entry[0])}
    if expected is not None and widths - {expected}:
        raise ValueError(
            f"A textual inversion of the prompt ({', '.join(inversions)}) has vectors of "
            f"{(widths - {expected}).pop()} numbers, but the text encoder {encoder} of this model takes "
            f"{expected}: it was made for another kind of model."
        )
