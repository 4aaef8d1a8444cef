"""Prompts as the text encoder sees them: words, and the tokens that each word became."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
REPLACEMENT = "\ufffd"


class WordNotFound(ValueError):
    """A word or phrase is not in the prompt."""


@dataclass(frozen=True)
class Word:
    """One word of the text encoder's vocabulary: "cat" of "cat,", or "," itself.

    In scripts without spaces (Chinese, Japanese) and among symbols such as emoji, one character is one word,
    where the tokens allow it.

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
        """Every place where `phrase` stands, as indices of words; case, white space and `_` do not matter.

        The phrase may be written as in the prompt, weights and punctuation included: "(red hair:1.2)," is
        "red hair", unless just that is in the prompt.
        """
        plain = _squash(_without_weights(phrase))
        spellings = (_squash(phrase), plain, _without_punctuation(plain))
        found = next(filter(None, map(self._places, spellings)), None)
        return found or [(n,) for n, word in enumerate(self.words) if word.text == phrase.strip()]

    def _places(self, wanted: str) -> list[tuple[int, ...]]:
        texts = [_squash(word.text) for word in self.words]
        found, first = [], 0
        while wanted and first < len(texts):
            last, joined = first, ""
            while last < len(texts) and len(joined) < len(wanted):
                joined += texts[last]
                last += 1
            if joined == wanted and texts[first]:
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
            words = self._words_as_written()
            wanted = (numbered[1] if numbered else phrase).strip().lower()
            meant = [f'Did you mean "{word}"? ' for word in get_close_matches(wanted, words, 1, 0.7)]
            raise WordNotFound(
                f'"{phrase.strip()}" is not in the prompt "{self.text}". {"".join(meant)}'
                f"Its words are: {', '.join(words) or '(none)'}."
            )
        return tuple(token for place in places for word in place for token in self.words[word].tokens)

    def _words_as_written(self) -> list[str]:
        """What stands between white space and commas, in lower case and each once: "1girl", "long_hair".

        In scripts without spaces, the vocabulary's words.
        """
        text = _without_weights(self.text).lower()
        parts = re.split(r"[\s,]+", text)
        if any(map(_stands_alone, text)):
            parts = [word.text for word in self.words]
        words = dict.fromkeys(map(_without_punctuation, parts))
        return [word for word in words if self.occurrences(word)]


def read_prompt(text: str, pieces: Sequence[Sequence[str]]) -> Prompt:
    """Group the vocabulary's pieces into words.

    pieces: one sequence per chunk, each `<|startoftext|>`, pieces, `<|endoftext|>`, padding. A piece that
        ends in `</w>` ends its word; a word may run on into the next chunk.

    Raises ValueError for pieces that are not laid out like this.
    """
    words: list[Word] = []
    chunks: list[Chunk] = []
    letters, tokens, offset = [], [], 0
    for chunk in pieces:
        if not chunk or chunk[0] != START or END not in chunk:
            raise ValueError(
                f"A chunk of tokens should begin with {START} and hold {END}; got {list(chunk)[:4]}."
            )
        end = chunk.index(END)
        for position, piece in enumerate(chunk[1:end], offset + 1):
            letters.append(piece.removesuffix(WORD_END))
            tokens.append(position)
            if piece.endswith(WORD_END):
                words += _words(letters, tokens)
                letters, tokens = [], []
        chunks.append(Chunk(offset, offset + end, offset + len(chunk)))
        offset += len(chunk)
    if tokens:
        words += _words(letters, tokens)
    return Prompt(text, tuple(words), tuple(chunks))


def _words(letters: Sequence[str], tokens: Sequence[int]) -> list[Word]:
    """One word of the vocabulary: as it is, or by its characters in scripts without spaces."""
    characters = list(_characters(letters, tokens))
    if all(_stands_alone(letter) for word in characters for letter in word.text):
        return characters
    return [Word(_decode("".join(letters)), tuple(tokens))]


def _characters(letters: Sequence[str], tokens: Sequence[int]) -> Iterator[Word]:
    """A word cut wherever a token ends together with a character."""
    first = 0
    for last in range(1, len(tokens) + 1):
        text = _decode("".join(letters[first:last]))
        if REPLACEMENT not in text or last == len(tokens):
            yield Word(text, tuple(tokens[first:last]))
            first = last


def _stands_alone(letter: str) -> bool:
    """Whether a character is a word of its own: Chinese and Japanese writing, and symbols such as emoji."""
    return unicodedata.category(letter) == "So" or unicodedata.name(letter, "").startswith(
        ("CJK UNIFIED", "CJK COMPAT", "IDEOGRAPHIC ITER", "HIRAGANA", "KATAKANA")
    )


def split_words(text: str) -> list[str]:
    """The entries of a widget that takes several words or phrases: separated by commas or line breaks.

    An entry in double quotes may hold commas: `hat, "red, white and blue"` has two entries.
    """
    rows = (csv.reader([line], skipinitialspace=True) for line in text.splitlines())
    return [part.strip() for row in rows for parts in row for part in parts if part.strip()]


def is_punctuation(text: str) -> bool:
    """Whether a word says nothing of its own: "," or ")", not an emoji."""
    return all(unicodedata.category(letter).startswith("P") for letter in text)


def spell(text: str) -> str:
    """Text as CLIP's vocabulary writes it: each byte of its UTF-8 as one printable character."""
    return "".join(_LETTERS[byte] for byte in text.encode())


def _squash(text: str) -> str:
    """Text without what does not matter: case, white space, `_`, invisible characters, width, extensions."""
    text = re.sub(r"(embedding:[^\s,]+?)\.(safetensors|pt|bin)(?![^\s,])", r"\1", text)
    folded = unicodedata.normalize("NFKC", text.lower())
    return "".join(
        c for c in folded if not c.isspace() and c != "_" and unicodedata.category(c) not in ("Cc", "Cf")
    )


def _without_punctuation(text: str) -> str:
    """Text from its first to its last letter or symbol: the vocabulary joins punctuation, ")," is a word."""
    inside = [n for n, letter in enumerate(text) if not is_punctuation(letter)]
    return text[inside[0] : inside[-1] + 1] if inside else ""


def _without_weights(phrase: str) -> str:
    """A phrase as it reads without the host's weight syntax: parentheses that are not escaped."""
    plain = re.sub(r"(:\s*[-+.\d]+\s*)?(?<!\\)\)|(?<!\\)\(", "", phrase)
    return plain.replace("\\(", "(").replace("\\)", ")")


def _byte_of_character() -> dict[str, int]:
    """CLIP's vocabulary writes each byte of UTF-8 as one printable character; this is the way back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_of_character()
_LETTERS = {byte: letter for letter, byte in _BYTES.items()}


def _decode(letters: str) -> str:
    if not all(letter in _BYTES for letter in letters):
        return letters
    return bytes(_BYTES[letter] for letter in letters).decode("utf-8", errors="replace")
