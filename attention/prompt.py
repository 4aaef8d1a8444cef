"""Prompts as the text encoder sees them: words, and the tokens that each word became."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


class WordNotFound(ValueError):
    """A word or phrase that a node asks for is not in the prompt."""


@dataclass(frozen=True)
class Word:
    """One word of the text encoder's vocabulary: "cat" of "cat,", or "," itself.

    text: lower-case, as the tokenizer normalised it.
    tokens: positions in the conditioning's token axis.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """One window of the text encoder (77 tokens for CLIP): start token, words, end token, padding.

    start, end: positions of the start token and of the first end token; stop: one past the last padding.
    """

    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, its words in order, and where its chunks lie.

    text: what the user wrote, weights in parentheses included.
    length: number of tokens t of the conditioning, all chunks together.
    """

    text: str
    words: tuple[Word, ...]
    chunks: tuple[Chunk, ...]

    @property
    def length(self) -> int:
        return self.chunks[-1].stop

    def occurrences(self, phrase: str) -> list[tuple[int, ...]]:
        """Every place where `phrase` stands, as indices of words; white space and case do not matter."""
        wanted = _squash(phrase)
        texts = [_squash(word.text) for word in self.words]
        found, first = [], 0
        while wanted and first < len(texts):
            last, joined = first, ""
            while last < len(texts) and len(joined) < len(wanted):
                joined += texts[last]
                last += 1
            if joined == wanted:
                found.append(tuple(range(first, last)))
                first = last
            else:
                first += 1
        return found

    def contains(self, phrase: str) -> bool:
        """Whether `find` would find it."""
        try:
            return bool(self.find(phrase))
        except WordNotFound:
            return False

    def find(self, phrase: str) -> tuple[int, ...]:
        """Token positions of a word or phrase: all of its occurrences, or the n-th for `phrase#n`.

        Raises WordNotFound, which lists the prompt's words.
        """
        places = self.occurrences(phrase)
        numbered = re.fullmatch(r"(.+?)\s*#\s*(\d+)", phrase.strip())
        if not places and numbered:
            places = self.occurrences(numbered[1])
            n = int(numbered[2])
            if places and not 1 <= n <= len(places):
                raise WordNotFound(
                    f'"{numbered[1]}" occurs {len(places)} times in "{self.text}", there is no #{n}.'
                )
            places = places[n - 1 : n]
        if not places:
            raise WordNotFound(
                f'"{phrase.strip()}" is not in the prompt "{self.text}". '
                f"Its words are: {', '.join(dict.fromkeys(word.text for word in self.words)) or '(none)'}."
            )
        return tuple(token for place in places for word in place for token in self.words[word].tokens)


def read_prompt(text: str, pieces: Sequence[Sequence[str]]) -> Prompt:
    """Group the vocabulary's pieces into words.

    pieces: one sequence per chunk, each `<|startoftext|>`, pieces, `<|endoftext|>`, padding. A piece that
        ends in `</w>` ends its word; a word may run on into the next chunk.

    Raises ValueError for pieces that are not laid out like this.
    """
    words: list[Word] = []
    chunks: list[Chunk] = []
    letters, tokens, offset = "", [], 0
    for chunk in pieces:
        if not chunk or chunk[0] != START or END not in chunk:
            raise ValueError(
                f"A chunk of tokens should begin with {START} and hold {END}; got {list(chunk)[:4]}."
            )
        end = chunk.index(END)
        for position, piece in enumerate(chunk[1:end], offset + 1):
            letters += piece.removesuffix(WORD_END)
            tokens.append(position)
            if piece.endswith(WORD_END):
                words.append(Word(_decode(letters), tuple(tokens)))
                letters, tokens = "", []
        chunks.append(Chunk(offset, offset + end, offset + len(chunk)))
        offset += len(chunk)
    if tokens:
        words.append(Word(_decode(letters), tuple(tokens)))
    return Prompt(text, tuple(words), tuple(chunks))


def split_words(text: str) -> list[str]:
    """The entries of a widget that takes several words or phrases: separated by commas or line breaks."""
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def _squash(text: str) -> str:
    return "".join(text.lower().split())


def _byte_of_character() -> dict[str, int]:
    """CLIP's vocabulary writes each byte of UTF-8 as one printable character; this is the way back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_of_character()


def _decode(letters: str) -> str:
    if not all(letter in _BYTES for letter in letters):
        return letters
    return bytes(_BYTES[letter] for letter in letters).decode("utf-8", errors="replace")
