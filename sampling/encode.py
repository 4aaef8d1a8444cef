"""From text to prompts: ComfyUI's tokenizers and text encoders."""

from __future__ import annotations

import re
from typing import Any

import torch
from comfy.sd1_clip import escape_important, token_weights, unescape_important

from ..attention.edit import Edit, Source
from ..attention.prompt import WORD_END, Prompt, read_prompt, spell

KEY = "prompt_to_prompt"
"""Under this key the wrappers are installed, and a paired conditioning carries its controller's mark."""

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
    inversions = _inversions(clip, text)
    missing = tuple(name for name, found in inversions if not found)
    prompt = read_prompt(text, _pieces(clip, text, [name for name, found in inversions if found]), missing)
    if not prompt.words:
        raise ValueError(f'The {role} prompt "{text}" has no word that the text encoder reads.')
    return prompt


def start_edit(clip: Any, source: str, target: str, mode: str) -> Edit:
    """An edit of one source and one target prompt."""
    return add_target(clip, Edit(Source(*encode(clip, source, "source"))), target, mode)


def add_target(clip: Any, edit: Edit, target: str, mode: str) -> Edit:
    """The edit with one more target."""
    prompt, conditioning = encode(clip, target, "target")
    return edit.with_target(prompt, mode, conditioning)


def _pieces(clip: Any, text: str, inversions: list[str]) -> list[list[str]]:
    """The vocabulary's strings of a text's tokens, chunk by chunk; a textual inversion counts as one word.

    inversions: the names of the text's textual inversions, in order.
    """
    encoders = clip.tokenize(text, return_word_ids=True)
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
        letters = spell(next(names)) if word not in words[:n] else ""
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


def _inversions(clip: Any, text: str) -> list[tuple[str, bool]]:
    """The textual inversions that a text names, as the host reads them, and whether the host found a file."""
    inversions = []
    for segment, _ in token_weights(escape_important(text), 1.0):
        before, *parts = re.split(f"[ \n]{EMBEDDING}", unescape_important(segment))
        if before.startswith(EMBEDDING):
            parts.insert(0, before.removeprefix(EMBEDDING))
        for part in parts:
            if not part.strip():
                raise ValueError(f'The prompt "{text}" has "{EMBEDDING}" without a name behind it.')
            name = EMBEDDING + part.split()[0].strip(",")
            alone = clip.tokenize(re.sub(r"([()])", r"\\\1", name), return_word_ids=True)
            entries = [entry for chunks in alone.values() for chunk in chunks for entry in chunk]
            is_text = any(entry[2] and not torch.is_tensor(entry[0]) for entry in entries)
            if not is_text:
                inversions.append((name, any(torch.is_tensor(entry[0]) for entry in entries)))
    return inversions
