"""Which source words each target word takes its cross-attention map from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt import Prompt

MODES = ("auto", "swap", "refine")


@dataclass(frozen=True)
class Pairing:
    """Target words that take their maps from source words; indices into the prompts' words.

    swapped: False for a word that both prompts share, True for words that replaced others.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    swapped: bool


@dataclass(frozen=True)
class Alignment:
    """How two prompts match.

    pairings: in the order of the target's words.
    new: target words that keep their own maps.
    removed: source words that no target word takes over.
    """

    pairings: tuple[Pairing, ...]
    new: tuple[int, ...]
    removed: tuple[int, ...]

    def describe(self, source: Prompt, target: Prompt) -> str:
        """One line per word or run of words, in the target's order, for people."""

        def quote(prompt: Prompt, words: Sequence[int]) -> str:
            return " ".join(prompt.words[word].text for word in words)

        lines = {
            pairing.target[0]: f"{quote(source, pairing.source)} -> {quote(target, pairing.target)} (swapped)"
            if pairing.swapped
            else f"{quote(target, pairing.target)} (shared)"
            for pairing in self.pairings
        }
        lines |= {word: f"+ {target.words[word].text} (new, own map)" for word in self.new}
        text = [lines[word] for word in sorted(lines)]
        return "\n".join(text + [f"- {source.words[word].text} (removed)" for word in self.removed])


def align(source: Prompt, target: Prompt, mode: str) -> Alignment:
    """Global alignment of words (Needleman-Wunsch: gap 0, match 1, mismatch -1), then swaps.

    Where a run of unmatched source words faces a run of unmatched target words, the target's words are
    swapped in for the source's (modes `auto` and `swap`) or count as new (mode `refine`). Runs of equal
    length pair word by word, others as a whole. A run that faces nothing is new or removed.

    Source: Hertz et al. 2023, section 3.2, which asks for equal word counts and one kind of edit at a time.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    matches = _match([word.text for word in source.words], [word.text for word in target.words])
    pairings: list[Pairing] = []
    new: list[int] = []
    removed: list[int] = []
    i0 = j0 = 0
    for i1, j1 in [*matches, (len(source.words), len(target.words))]:
        left, right = tuple(range(i0, i1)), tuple(range(j0, j1))
        if left and right and mode != "refine":
            runs = (
                zip([(i,) for i in left], [(j,) for j in right], strict=True)
                if len(left) == len(right)
                else [(left, right)]
            )
            pairings += [Pairing(a, b, swapped=True) for a, b in runs]
        else:
            removed += left
            new += right
        if i1 < len(source.words) and j1 < len(target.words):
            pairings.append(Pairing((i1,), (j1,), swapped=False))
        i0, j0 = i1 + 1, j1 + 1
    return Alignment(tuple(pairings), tuple(new), tuple(removed))


def _match(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of equal words in order, as many as there can be, the earliest where there is a choice."""
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            same = score[i + 1][j + 1] + 1 if source[i] == target[j] else 0
            score[i][j] = max(same, score[i + 1][j], score[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(source) and j < len(target):
        if source[i] == target[j] and score[i][j] == score[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif score[i + 1][j] >= score[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def token_mapping(source: Prompt, target: Prompt, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """The alignment of words, written for tokens.

    Paired words with equal token counts pair their tokens one to one; with unequal counts each target
    token takes 1 / len(target tokens) of every source token, as in the paper's code, so that the attention
    paid to the pair stays the same in sum. Start tokens map to start tokens, end to end; padding keeps its
    position in the chunk, and a target's padding at j takes the source's at max(j, first padding of the
    source). A target chunk that the source lacks takes these from the source's last chunk.

    Returns M (source tokens, target tokens) float32, column j says where target token j takes its map from;
    and inherits (target tokens,) float32, 1 where column j takes the source's map, 0 where it keeps its own.
    """
    mapping = torch.zeros(source.length, target.length)
    inherits = torch.zeros(target.length)
    for pairing in alignment.pairings:
        rows = [token for word in pairing.source for token in source.words[word].tokens]
        columns = [token for word in pairing.target for token in target.words[word].tokens]
        if len(rows) == len(columns):
            mapping[rows, columns] = 1.0
        else:
            mapping[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1.0 / len(columns)
        inherits[columns] = 1.0
    for n, chunk in enumerate(target.chunks):
        origin = source.chunks[min(n, len(source.chunks) - 1)]
        mapping[origin.start, chunk.start] = 1.0
        mapping[origin.end, chunk.end] = 1.0
        inherits[[chunk.start, chunk.end]] = 1.0
        first_padding = min(origin.end + 1, origin.stop - 1) - origin.start
        for position in range(chunk.end + 1, chunk.stop):
            offset = min(max(position - chunk.start, first_padding), origin.stop - 1 - origin.start)
            mapping[origin.start + offset, position] = 1.0
            inherits[position] = 1.0
    return mapping, inherits
