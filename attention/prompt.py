"""Prompts as the text encoder sees them: words, and the tokens that each word became."""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import accumulate

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
LONGEST_GUESS, MOST_WRITTEN = 100, 1000
"""Letters of a phrase for which a similar word is proposed; words of a prompt that are listed as written."""

_EXTENSION = re.compile(r"(?<!embedding:)\.(safetensors|pt|bin)\Z")
_BASE, _PRIME = 1_000_003, 2**61 - 1


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
    """One window of a text encoder (77 tokens for CLIP), as positions in the conditioning's token axis.

    begin: first position. start: first token of what stands before the words: the start token, a template.
    first: first token of the words. end: first token behind the words: the end token, a template's rest.
    padding: first token of the padding. stop: one past the last. Between begin and start is padding too.
    stream: which of the text encoders, from 0.
    """

    begin: int
    start: int
    first: int
    end: int
    padding: int
    stop: int
    stream: int = 0

    def moved(self, to: Callable[[int], int]) -> Chunk:
        """The chunk with every position moved."""
        begin, start, first = to(self.begin), to(self.start), to(self.first)
        return Chunk(begin, start, first, to(self.end), to(self.padding), to(self.stop), self.stream)


@dataclass(frozen=True)
class Prompt:
    """A prompt, its words in order, and where its chunks lie.

    text: what the user wrote, weights in parentheses included.
    chunks: of all text encoders whose tokens the attention sees, side by side.
    length: number of tokens t of the conditioning, all chunks together.
    """

    text: str
    words: tuple[Word, ...]
    chunks: tuple[Chunk, ...]

    @property
    def length(self) -> int:
        return self.chunks[-1].stop

    def stream(self, number: int) -> tuple[Chunk, ...]:
        """The chunks of one text encoder; none if the prompt has no such stream."""
        return tuple(chunk for chunk in self.chunks if chunk.stream == number)

    def occurrences(self, phrase: str) -> list[tuple[int, ...]]:
        """Every place where `phrase` stands, as indices of words; case, white space and `_` do not matter.

        The phrase may be written as in the prompt, weights and punctuation included: "(red hair:1.2)," is
        "red hair", unless just that is in the prompt.
        """
        plain = _squash(_without_weights(phrase))
        spellings = (_squash(phrase), plain, _without_punctuation(plain))
        found = next(filter(None, map(self._places, spellings)), None)
        return found or [(n,) for n, word in enumerate(self.words) if word.text == phrase.strip()]

    @cached_property
    def _letters(self) -> tuple[str, list[int], dict[int, int], dict[int, int]]:
        """The words' squashed text in one piece, its checksums, and which word begins and ends where."""
        parts = [_squash(word.text) for word in self.words]
        places = list(accumulate(map(len, parts), initial=0))
        spelt = [n for n, part in enumerate(parts) if part]
        begins = {places[n]: n for n in spelt}
        ends = {places[n + 1]: n + 1 for n in spelt}
        text = "".join(parts)
        return text, _checksums(text), begins, ends

    def _places(self, wanted: str) -> list[tuple[int, ...]]:
        """Runs of whole words that spell `wanted`, without overlaps (Karp and Rabin 1987)."""
        text, sums, begins, ends = self._letters
        total, power = _checksums(wanted)[-1], pow(_BASE, len(wanted), _PRIME)
        found: list[tuple[int, ...]] = []
        free = 0
        for start, first in begins.items() if wanted else ():
            stop = start + len(wanted)
            if start < free or stop not in ends:
                continue
            if (sums[stop] - sums[start] * power - total) % _PRIME == 0 and text.startswith(wanted, start):
                found.append(tuple(range(first, ends[stop])))
                free = stop
        return found

    def contains(self, phrase: str) -> bool:
        """Whether `find` would find it."""
        return bool(self._numbered(phrase)[0])

    def find(self, phrase: str) -> tuple[int, ...]:
        """Token positions of a word or phrase: all of its occurrences, or the n-th for `phrase#n`.

        Raises WordNotFound, which lists the prompt's words.
        """
        places, name, count = self._numbered(phrase)
        if not places and count:
            number = phrase.rpartition("#")[2].strip()
            raise WordNotFound(f'"{name}" occurs {count} times in "{self.text}", there is no #{number}.')
        if not places:
            words = self._words_as_written()
            wanted = name.lower()
            close = get_close_matches(wanted, words, 1, 0.7) if len(wanted) <= LONGEST_GUESS else []
            meant = [f'Did you mean "{word}"? ' for word in close]
            raise WordNotFound(
                f'"{phrase.strip()}" is not in the prompt "{self.text}". {"".join(meant)}'
                f"Its words are: {', '.join(words) or '(none)'}."
            )
        return tuple(token for place in places for word in place for token in self.words[word].tokens)

    def _numbered(self, phrase: str) -> tuple[list[tuple[int, ...]], str, int]:
        """The places that a phrase means, itself without `#n`, and how often it stands in the prompt."""
        phrase = phrase.strip()
        places = self.occurrences(phrase)
        name, mark, number = phrase.rpartition("#")
        name, number = name.strip(), number.strip()
        if places or not (name and mark and number.isdecimal()):
            return places, phrase, len(places)
        places = self.occurrences(name)
        n = int(number) if len(number) < 10 else 0  # Python refuses to read very long ones
        return places[n - 1 : n] if n else [], name, len(places)

    def _words_as_written(self) -> list[str]:
        """What stands between white space and commas, in lower case and each once: "1girl", "long_hair".

        In scripts without spaces, and in prompts of very many words, the vocabulary's words.
        """
        text = _without_weights(self.text).lower()
        if len(self.words) > MOST_WRITTEN or any(map(stands_alone, text)):
            words = dict.fromkeys(word.text for word in self.words)
            return [word for word in words if _squash(word) and not is_punctuation(word)]
        words = dict.fromkeys(map(_without_punctuation, re.split(r"[\s,]+", text)))
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
        begin, end = offset, offset + end
        chunks.append(Chunk(begin, begin, begin + 1, end, end + 1, begin + len(chunk)))
        offset += len(chunk)
    if tokens:
        words += _words(letters, tokens)
    return Prompt(text, tuple(words), tuple(chunks))


def _words(letters: Sequence[str], tokens: Sequence[int]) -> list[Word]:
    """One word of the vocabulary: as it is, or by its characters in scripts without spaces."""
    characters = list(_characters(letters, tokens))
    if all(stands_alone(letter) for word in characters for letter in word.text):
        return characters
    return [Word(_decode("".join(letters)), tuple(tokens))]


def _characters(letters: Sequence[str], tokens: Sequence[int]) -> Iterator[Word]:
    """A word cut wherever a token ends together with a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, first = "", 0
    for last, piece in enumerate(letters, 1):
        spelt = all(letter in _BYTES for letter in piece)
        text += decoder.decode(bytes(_BYTES[letter] for letter in piece)) if spelt else piece
        if last == len(letters):
            text += decoder.decode(b"", final=True)
        if last == len(letters) or not decoder.getstate()[0]:
            yield Word(text, tuple(tokens[first:last]))
            text, first = "", last


def stands_alone(letter: str) -> bool:
    """Whether a character is a word of its own: Chinese and Japanese writing, and symbols such as emoji."""
    return unicodedata.category(letter) == "So" or unicodedata.name(letter, "").startswith(
        ("CJK UNIFIED", "CJK COMPAT", "IDEOGRAPHIC ITER", "HIRAGANA", "KATAKANA")
    )


def split_words(text: str) -> list[str]:
    """The entries of a widget that takes several words or phrases: separated by commas or line breaks.

    An entry in double quotes may hold commas: `hat, "red, white and blue"` has two entries.
    """
    rows = (csv.reader([line], skipinitialspace=True) for line in text.splitlines())
    try:
        return [part.strip() for row in rows for parts in row for part in parts if part.strip()]
    except csv.Error as error:
        raise ValueError(f"The list of words cannot be read: {error}.") from None


def is_punctuation(text: str) -> bool:
    """Whether a word says nothing of its own: "," or ")", not an emoji."""
    return all(unicodedata.category(letter).startswith("P") for letter in text)


def bytes_of(piece: str) -> bytes:
    """The bytes that a piece of a byte-level vocabulary spells, or its UTF-8 if it spells none."""
    return bytes(_BYTES[c] for c in piece) if all(c in _BYTES for c in piece) else piece.encode()


def spell(text: str) -> str:
    """Text as CLIP's vocabulary writes it: each byte of its UTF-8 as one printable character."""
    return "".join(_LETTERS[byte] for byte in text.encode())


def _squash(text: str) -> str:
    """Text without what does not matter: case, white space, `_`, invisible characters, width, extensions."""
    text = re.sub(r"embedding:[^\s,]+", lambda name: _EXTENSION.sub("", name[0]), text)
    folded = unicodedata.normalize("NFKC", _with_few_marks(text.lower()))
    return "".join(
        c for c in folded if not c.isspace() and c != "_" and unicodedata.category(c) not in ("Cc", "Cf")
    )


def _with_few_marks(text: str) -> str:
    """Text without the marks on one letter beyond 30: to normalise n of them takes time in n squared."""
    kept, marks = [], 0
    for letter in text:
        marks = marks + 1 if unicodedata.combining(letter) else 0
        if marks <= 30:
            kept.append(letter)
    return "".join(kept)


def _checksums(text: str) -> list[int]:
    """Of the first 0, 1, ... letters: a polynomial in their code points, so that differences are of parts."""
    return list(accumulate(map(ord, text), lambda total, n: (total * _BASE + n) % _PRIME, initial=0))


def _without_punctuation(text: str) -> str:
    """Text from its first to its last letter or symbol: the vocabulary joins punctuation, ")," is a word."""
    inside = (n for n, letter in enumerate(text) if not is_punctuation(letter))
    first = next(inside, len(text))
    last = next((n for n in range(len(text), first, -1) if not is_punctuation(text[n - 1])), first)
    return text[first:last]


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
    return bytes_of(letters).decode("utf-8", errors="replace")
