"""Reading prompts without a model, as the page does while they are being written."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from comfy import sd1_clip

from ..attention.alignment import Alignment, align
from .encode import EncodedPrompt, read

MOST_WORDS = 1000
"""Of a prompt: alignment takes time in the number of words squared."""
KEPT = 4
"""Tokenizers of other text encoders than CLIP that are kept for the page."""


class WordReader:
    """What `read` needs of a CLIP object, without a text encoder.

    It reads no file: every textual inversion counts as one token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.copy(tokenizer)
        for name, each in vars(tokenizer).items():
            if hasattr(each, "_try_get_embedding"):
                setattr(self.tokenizer, name, _without_files(each))

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)


def _without_files(tokenizer: Any) -> Any:
    """One of the host's tokenizers that finds every textual inversion, and looks for none."""
    alone = copy.copy(tokenizer)
    alone.embedding_directory = []

    def find(*args: Any, **kwargs: Any) -> tuple:
        _, *rest = type(alone)._try_get_embedding(alone, *args, **kwargs)
        return torch.zeros(alone.embedding_size), *rest

    alone._try_get_embedding = find
    return alone


class Readers:
    """Readers by the name of the host's tokenizer: CLIP's, and those that were remembered last."""

    def __init__(self) -> None:
        self._clip: WordReader | None = None
        self._others: OrderedDict[str, WordReader] = OrderedDict()

    def remember(self, clip: Any) -> str:
        """Keep a CLIP object's tokenizer, and only that, for prompts that the page asks for; its name."""
        name = type(clip.tokenizer).__name__
        self._others[name] = WordReader(clip.tokenizer)
        self._others.move_to_end(name)
        while len(self._others) > KEPT:
            self._others.popitem(last=False)
        return name

    def get(self, name: str) -> WordReader:
        """The reader of that name; CLIP's, which is SD's and SDXL's, for one that is not kept."""
        found = self._others.get(name)
        if found is not None:
            return found
        if self._clip is None:
            self._clip = WordReader(sd1_clip.SD1Tokenizer())
        return self._clip


READERS = Readers()


def preview(
    source: str, target: str, mode: str, encoder: str = ""
) -> tuple[EncodedPrompt, EncodedPrompt, Alignment]:
    """Source and target as a text encoder would read them, and their alignment.

    encoder: a name that `READERS.remember` gave. The words are those that sampling sees; the token count of a
    textual inversion is not known here and counts as 1.

    Raises ValueError for an empty prompt, an unknown mode, and for what is too long or too deeply nested to
    be read.
    """
    reader = READERS.get(encoder)
    try:
        prompts = read(reader, source, "source"), read(reader, target, "target")
    except RecursionError:
        raise ValueError("The parentheses are nested too deeply.") from None
    for prompt, role in zip(prompts, ("source", "target"), strict=True):
        if len(prompt.words) > MOST_WORDS:
            count = len(prompt.words)
            raise ValueError(f"The {role} prompt has {count} words; at most {MOST_WORDS} are aligned here.")
    return *prompts, align(*prompts, mode)
