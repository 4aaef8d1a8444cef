"""From text to prompts: ComfyUI's tokenizers and text encoders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..attention.edit import Edit, Source
from ..attention.prompt import WORD_END, Prompt, read_prompt

KEY = "prompt_to_prompt"
"""Under this key the wrappers are installed, and a paired conditioning carries its controller's mark."""

_EMBEDDING = re.compile(r"embedding:(\S+?)(?=[\s,():]|$)")


def check_prompt(text: str, role: str) -> None:
    """Raise ValueError for an empty prompt; role is "source" or "target"."""
    if not text.strip():
        raise ValueError(f"The {role} prompt is empty; expected at least one word.")


def encode(clip: Any, text: str, role: str) -> tuple[Prompt, list]:
    """Tokenize and encode a prompt with a ComfyUI CLIP object.

    role: "source" or "target", for messages. Returns the prompt's words and the host's CONDITIONING.
    Raises ValueError for an empty prompt and for text encoders without CLIP's vocabulary.
    """
    prompt = read(clip, text, role)
    return prompt, clip.encode_from_tokens_scheduled(clip.tokenize(text))


def read(clip: Any, text: str, role: str) -> Prompt:
    """The words of a prompt; raises what `encode` raises.

    clip: a ComfyUI CLIP object, of which only `tokenize` and `tokenizer` are used.
    """
    check_prompt(text, role)
    return read_prompt(text, _pieces(clip, text))


def start_edit(clip: Any, source: str, target: str, mode: str) -> Edit:
    """An edit of one source and one target prompt."""
    return add_target(clip, Edit(Source(*encode(clip, source, "source"))), target, mode)


def add_target(clip: Any, edit: Edit, target: str, mode: str) -> Edit:
    """The edit with one more target."""
    prompt, conditioning = encode(clip, target, "target")
    return edit.with_target(prompt, mode, conditioning)


def _pieces(clip: Any, text: str) -> list[list[str]]:
    """The vocabulary's strings of a text's tokens, chunk by chunk; a textual inversion counts as one word."""
    encoders = clip.tokenize(text, return_word_ids=True)
    name = next((name for name in ("l", "h", "g") if name in encoders), None)
    if name is None or set(encoders) - {"l", "g", "h"}:
        raise ValueError(
            f"The text encoder gives tokens for {', '.join(encoders)}; Prompt-to-Prompt works on models with "
            "CLIP text encoders and cross-attention (SD1.x, SD2.x, SDXL). Connect the CLIP of such a model."
        )
    names = iter(_EMBEDDING.findall(text))
    return [_chunk_pieces(clip, chunk, names) for chunk in encoders[name]]


def _chunk_pieces(clip: Any, chunk: Sequence[tuple], names: Any) -> list[str]:
    pieces: list[str] = []
    open_word = None
    for position, (token, weight, word, *_) in enumerate(chunk):
        if not torch.is_tensor(token):
            pieces.append(clip.tokenizer.untokenize([(token, weight)])[0][1])
            continue
        first = word != open_word
        open_word = word
        following = chunk[position + 1] if position + 1 < len(chunk) else (None, 1.0, None)
        last = not torch.is_tensor(following[0]) or following[2] != word
        letters = f"embedding:{next(names, 'unnamed')}" if first else ""
        pieces.append(letters + (WORD_END if last else ""))
    return pieces
