"""Reading prompts without a model, as the page does while they are being written."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from comfy import sd1_clip

from ..attention.alignment import Alignment, align
from .encode import EncodedPrompt, read

FAMILIES = ("clip",)
"""Families of tokenizers: CLIP's vocabulary is the one of SD1.x, SD2.x and SDXL."""


class WordTokenizer(sd1_clip.SDTokenizer):
    """CLIP's tokenizer of the host, which reads no file: every textual inversion counts as one token."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "embedding_directory": []})

    def _try_get_embedding(self, embedding_name: str) -> tuple:
        _, *rest = super()._try_get_embedding(embedding_name)
        return torch.zeros(self.embedding_size), *rest


class WordReader:
    """What `read` needs of a CLIP object, without a text encoder."""

    def __init__(self) -> None:
        self.tokenizer = sd1_clip.SD1Tokenizer(tokenizer=WordTokenizer)

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)


@cache
def _reader(family: str) -> WordReader:
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(FAMILIES)}.")
    return WordReader()


def preview(
    source: str, target: str, mode: str, family: str = "clip", most_words: int = 1000
) -> tuple[EncodedPrompt, EncodedPrompt, Alignment]:
    """Source and target as a text encoder of the family would read them, and their alignment.

    The words are those that sampling sees; the token count of a textual inversion is not known here and
    counts as 1. most_words: alignment takes time in the number of words squared.

    Raises ValueError for an empty prompt, an unknown mode or family, and for what is too long or too deeply
    nested to be read.
    """
    reader = _reader(family)
    try:
        prompts = read(reader, source, "source"), read(reader, target, "target")
    except RecursionError:
        raise ValueError("The parentheses are nested too deeply.") from None
    for prompt, role in zip(prompts, ("source", "target"), strict=True):
        if len(prompt.words) > most_words:
            count = len(prompt.words)
            raise ValueError(f"The {role} prompt has {count} words; at most {most_words} are aligned here.")
    return *prompts, align(*prompts, mode)
