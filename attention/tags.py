"""Prompts as lists of tags: the words between commas, which may stand in any order."""

from __future__ import annotations

from collections.abc import Sequence

from .prompt import Prompt, is_punctuation

COMMAS = ",\uff0c\u3001"
"""The comma, the full-width comma and the ideographic comma."""

Tag = tuple[int, ...]
"""Indices of a prompt's words."""


def is_comma(text: str) -> bool:
    """Whether a word of the text encoder's vocabulary separates tags: ",", but also ",," or "),"."""
    return not any(map(str.isalnum, text)) and any(letter in COMMAS for letter in text)


def key(text: str) -> str:
    """What two words must have in common to be the same: the text, but any comma is one."""
    return "," if is_comma(text) else text


def split_tags(prompt: Prompt, words: Sequence[int] | None = None) -> list[Tag]:
    """The tags of a prompt, or of some of its words, in order, without those that are empty."""
    tags: list[Tag] = []
    tag: list[int] = []
    for word in [*(range(len(prompt.words)) if words is None else words), None]:
        if word is not None and not is_comma(prompt.words[word].text):
            tag.append(word)
        else:
            tags.append(trim(prompt, tag))
            tag = []
    return [tag for tag in tags if tag]


def trim(prompt: Prompt, words: Sequence[int]) -> Tag:
    """Words of a prompt without the punctuation at either end."""
    inside = [n for n, word in enumerate(words) if not is_punctuation(prompt.words[word].text)]
    return tuple(words[inside[0] : inside[-1] + 1]) if inside else ()


def tag_text(prompt: Prompt, words: Sequence[int]) -> str:
    """Words of a prompt, apart by spaces."""
    return " ".join(prompt.words[word].text for word in words)
