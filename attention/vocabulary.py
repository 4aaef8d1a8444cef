"""Any tokenizer's tokens as letters, and the words that they make up: the text's own, where tokens allow."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate

from .prompt import WORD_END, Word, bytes_of, stands_alone

PROBE = "a fluffy cat on a beach"
"""A text that every vocabulary spells without loss."""
UNKNOWN = "\ufffd"
"""What a piece for letters that a vocabulary lacks is read as."""

Piece = tuple[bytes, tuple[int, ...]]
"""The UTF-8 that a piece of a vocabulary stands for, and its tokens: one, or all vectors of an inversion."""
Letter = tuple[str, tuple[int, ...]]
"""A letter and the tokens that spell it."""

_EMBEDDING = re.compile(r"embedding:[^\s,]+")
_CONTRACTION = re.compile(r"(?<=[^\W\d_])['\u2019](?:s|t|re|ve|m|ll|d)(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True)
class Letters:
    """A text as a tokenizer spelled it, folded by `fold`.

    tokens: of each letter, positions among the tokenizer's tokens. A token of white space alone counts to the
    next letter, at the end to the last one.
    """

    text: str
    tokens: tuple[tuple[int, ...], ...]

    def parts_at(self, place: int | None) -> bool:
        """Whether no token reaches over a place between two letters; None is nowhere."""
        if place is None:
            return False
        inside = 0 < place < len(self.text)
        return not inside or set(self.tokens[place - 1]).isdisjoint(self.tokens[place])


def _byte_level(piece: str) -> bytes:
    return bytes_of(piece.removesuffix(WORD_END)) + b" " * piece.endswith(WORD_END)


def _sentencepiece(piece: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if byte:
        return bytes.fromhex(byte[1])
    return (UNKNOWN if piece == "<unk>" else piece.replace("\u2581", " ")).encode()


def _wordpiece(piece: str) -> bytes:
    if piece == "[UNK]":
        return f" {UNKNOWN}".encode()
    return (piece[2:] if piece.startswith("##") else f" {piece}").encode()


SPELLINGS: dict[str, Callable[[str], bytes]] = {
    "byte-level": _byte_level,
    "SentencePiece": _sentencepiece,
    "WordPiece": _wordpiece,
}
"""What a vocabulary's piece stands for. Byte-level: a character is a byte, U+0120 a space (Qwen, Llama), or
`</w>` ends a word (CLIP). SentencePiece (T5, Gemma): U+2581 is a space, `<0xE7>` a byte. WordPiece (BERT):
`##` goes on with a word."""


def spelling_of(pieces: Sequence[str]) -> Callable[[str], bytes] | None:
    """Which of `SPELLINGS` a vocabulary has, from its pieces for `PROBE`; None if no one reads it there."""
    for spelling in SPELLINGS.values():
        if b"".join(map(spelling, pieces)).decode(errors="replace").strip() == PROBE:
            return spelling
    return None


def spelled(pieces: Iterable[Piece]) -> list[Letter]:
    """The letters of a tokenizer's pieces, white space included; a letter may take several of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    letters: list[Letter] = []
    tokens: tuple[int, ...] = ()
    for piece, its in pieces:
        for n in range(len(piece)):
            tokens = tuple(dict.fromkeys(tokens + its))
            text = decoder.decode(piece[n : n + 1])
            letters += [(letter, tokens) for letter in text]
            tokens = () if text else tokens
    return letters + [(letter, tokens) for letter in decoder.decode(b"", final=True)]


def inside(letters: Sequence[Letter], before: str, after: str) -> list[Letter]:
    """The letters of a text without those of the template around it.

    before, after: the template's text on either side; how it is cut into letters does not matter, nor what
    the tokenizer makes of its white space, except beside the text.
    """
    first = _behind(letters, before)
    last = len(letters) - _behind(letters[first:][::-1], after[::-1])
    return list(letters[first:last])


def _behind(letters: Sequence[Letter], template: str) -> int:
    """Where the letters of a template that stands first end."""
    left = len(fold(template))
    place = 0
    while left > 0 and place < len(letters):
        left -= len(fold(letters[place][0]))
        place += 1
    spaces = len(template) - len(template.rstrip())
    while spaces and place < len(letters) and letters[place][0].isspace():
        spaces, place = spaces - 1, place + 1
    return place


def folded(letters: Sequence[Letter]) -> Letters:
    """Letters without what does not matter for where they belong: see `fold`."""
    spelling = {token for letter, tokens in letters if fold(letter) for token in tokens}
    text: list[str] = []
    owners: list[tuple[int, ...]] = []
    spaces: tuple[int, ...] = ()
    for letter, tokens in letters:
        mark = fold(letter)
        if not mark:
            spaces += tuple(token for token in tokens if token not in spelling)
            continue
        text.append(mark)
        owners += [tuple(dict.fromkeys(spaces + tokens))] * len(mark)
        spaces = ()
    if owners:
        owners[-1] += tuple(dict.fromkeys(spaces))
    return Letters("".join(text), tuple(owners))


def fold(text: str) -> str:
    """Text letter by letter without case and width, white space and what cannot be seen."""
    letters = (unicodedata.normalize("NFKC", letter).lower() for letter in text)
    return "".join(
        c for mark in letters for c in mark if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf")
    )


def common_words(text: str, streams: Sequence[Letters], offsets: Sequence[int]) -> tuple[Word, ...]:
    """The words of a text, cut where a word of `words_in` ends and where no token of any stream reaches over.

    text: what the text encoders were given, without template. streams: what their tokenizers made of it.
    offsets: where each stream's tokens begin in the conditioning. A word has its tokens of all streams, or
    of those that did not leave it out; a word that all left out is none.
    """
    spans = words_in(text)
    parts = [fold(text[start:stop]) for start, stop in spans]
    borders = list(accumulate(map(len, parts), initial=0))
    letters = "".join(parts)
    places = [_places(letters, stream.text) for stream in streams]
    cuts = [
        n
        for n, border in enumerate(borders)
        if all(stream.parts_at(place[border]) for place, stream in zip(places, streams, strict=True))
    ]
    words: list[Word] = []
    for n, m in zip(cuts, cuts[1:], strict=False):
        tokens = {
            token + offset
            for place, stream, offset in zip(places, streams, offsets, strict=True)
            for owners in stream.tokens[place[borders[n]] : place[borders[m]]]
            for token in owners
        }
        if tokens:
            words.append(Word(text[spans[n][0] : spans[m - 1][1]].lower(), tuple(sorted(tokens))))
    return tuple(words)


def _places(text: str, stream: str) -> list[int | None]:
    """Where each place between letters of a text lies in a stream; None inside of what reads otherwise."""
    if text == stream:
        return list(range(len(text) + 1))
    places: list[int | None] = [None] * (len(text) + 1)
    matcher = SequenceMatcher(None, text, stream, autojunk=False)
    for kind, i, stop, j, end in matcher.get_opcodes():
        if kind == "equal":
            places[i : stop + 1] = range(j, end + 1)
        elif kind == "delete":
            places[i : stop + 1] = [j] * (stop + 1 - i)
        else:
            places[i], places[stop] = j, end
    places[0], places[-1] = 0, len(stream)
    return places


def words_in(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end.

    A word is a run of letters, of digits, or of other marks; "'s" and its like; one character of writing
    without spaces, or one symbol such as an emoji; and a textual inversion's whole name.
    """
    whole = {found.start(): found.end() for found in _CONTRACTION.finditer(text)}
    whole |= {found.start(): found.end() for found in _EMBEDDING.finditer(text)}
    spans: list[tuple[int, int]] = []
    before, stop = "space", 0
    for place, letter in enumerate(text):
        if place < stop:
            continue
        kind, stop = _kind(letter), whole.get(place, place + 1)
        if place in whole:
            kind = "alone"
        joined = kind == "mark" or text[place - 1 : place] == "\u200d"
        if spans and before != "space" and (joined or (kind == before and kind != "alone")):
            spans[-1] = (spans[-1][0], stop)
            kind = before
        elif kind != "space":
            spans.append((place, stop))
        before = kind
    return spans


def _kind(letter: str) -> str:
    if stands_alone(letter):
        return "alone"
    category = unicodedata.category(letter)
    if letter.isspace() or category == "Cc":
        return "space"
    if category[0] == "M" or category == "Cf" or "\U0001f3fb" <= letter <= "\U0001f3ff":
        return "mark"
    return {"L": "letter", "N": "digit"}.get(category[0], "other")
