"""Prompts made by hand, without a tokenizer: words apart by spaces, a word's pieces by `|`."""

from __future__ import annotations

from p2p.attention.prompt import END, START, WORD_END, Prompt, read_prompt


def pieces_of(text: str, window: int = 77) -> list[list[str]]:
    """The pieces of "a bi|cycle", in windows as the host lays them out: start, pieces, end, padding."""
    pieces = []
    for word in text.split():
        *first, last = word.split("|")
        pieces += [*first, last + WORD_END]
    room = window - 2
    windows = [pieces[n : n + room] for n in range(0, len(pieces), room)] or [[]]
    return [[START, *part, END, *[END] * (room - len(part))] for part in windows]


def prompt_of(text: str, window: int = 77) -> Prompt:
    """The prompt that `pieces_of` gives."""
    return read_prompt(text.replace("|", ""), pieces_of(text, window))


def tokens_of(prompt: Prompt, word: int) -> list[int]:
    return list(prompt.words[word].tokens)
