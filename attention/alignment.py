"""Which source words each target word takes its cross-attention map from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt import Chunk, Prompt
from .tags import Tag, is_comma, key, split_tags, tag_text, trim

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
        """A line for each swap and each run of shared, new or removed words, in the target's order."""
        shared = [(pairing.source[0], pairing.target[0]) for pairing in self.pairings if not pairing.swapped]
        lines: dict[int, str] = {}
        for run in _runs(shared):
            lines[run[0][1]] = f"{tag_text(target, [j for _, j in run])} (shared)"
        for pairing in self.pairings:
            if pairing.swapped:
                old, new = tag_text(source, pairing.source), tag_text(target, pairing.target)
                lines[pairing.target[0]] = f"{old} -> {new} (swapped)"
        for run in _runs([(j, j) for j in self.new]):
            lines[run[0][1]] = f"+ {tag_text(target, [j for _, j in run])} (new, own map)"
        text = [lines[word] for word in sorted(lines)]
        for run in _runs([(i, i) for i in self.removed]):
            text.append(f"- {tag_text(source, [i for i, _ in run])} (removed)")
        return "\n".join(text)


def _runs(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Pairs of words, cut where they do not stand side by side in both prompts."""
    runs: list[list[tuple[int, int]]] = []
    for i, j in pairs:
        if runs and runs[-1][-1] == (i - 1, j - 1):
            runs[-1].append((i, j))
        else:
            runs.append([(i, j)])
    return runs


def align(source: Prompt, target: Prompt, mode: str) -> Alignment:
    """Which words of two prompts belong together: a global alignment, then swaps.

    Equal words match in order, as many as there can be (Needleman-Wunsch: gap 0, match 1, mismatch -1; commas
    count less than words). Where there is a choice, matches stand side by side, and early ones come first.
    Where a run of unmatched source words faces a run of unmatched target words, the mode decides:

    swap: the target's words are swapped in for the source's, by position. Runs of equal length pair word by
        word, others as a whole. A tag (all that stands between two commas) that faces several tags pairs with
        the first of them.
    refine: nothing is swapped, and only words that both prompts share take the source's maps.
    auto: as swap.

    A run that faces nothing, or is not swapped, is new or removed; so is punctuation around a run. In `auto`
    and `refine` a tag that stands in both prompts is shared even if it moved to another place, because the
    order of tags means nothing; `swap` goes by position alone. The order of prose does mean something: "a cat
    and a dog" to "a dog and a cat" is a swap.

    Source: Hertz et al. 2023, section 3.2, which asks for equal word counts and one kind of edit at a time.
    Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    keys = [key(word.text) for word in target.words]
    order = list(range(len(source.words))) if mode == "swap" else _in_order_of(source, target)
    matches = _match([key(source.words[i].text) for i in order], keys)
    in_place = [(order[n], j) for n, j in matches]
    moved = [] if mode == "swap" else _moved(source, target, in_place)
    pairings = [Pairing((i,), (j,), swapped=False) for i, j in in_place + moved]
    sources, targets = {i for i, _ in moved}, {j for _, j in moved}
    tags = {*split_tags(source)}, {*split_tags(target)}
    new: list[int] = []
    removed: list[int] = []
    place = word = 0  # the first of the source's order, and of the target's words, behind the last match
    for matched_place, matched_word in [*matches, (len(order), len(keys))]:
        old_run = [i for i in order[place:matched_place] if i not in sources]
        new_run = [j for j in range(word, matched_word) if j not in targets]
        swaps = _swaps(source, target, old_run, new_run, tags) if mode != "refine" else []
        pairings += [Pairing(*swap, swapped=True) for swap in swaps]
        removed += sorted({*old_run}.difference(*(swap[0] for swap in swaps)))
        new += sorted({*new_run}.difference(*(swap[1] for swap in swaps)))
        place, word = matched_place + 1, matched_word + 1
    return Alignment(
        tuple(sorted(pairings, key=lambda pairing: pairing.target)), tuple(new), tuple(sorted(removed))
    )


def _match(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of equal entries in order: as many as there can be, then in the fewest runs, then the earliest.

    Commas do not count; where all else is equal, as many of them as possible pair too.
    """
    unit = min(len(source), len(target)) + 1
    # best[i][j][k]: the score from (i, j) on; k is 1 where the two entries before are a pair.
    best = [[(0, 0)] * (len(target) + 1) for _ in range(len(source) + 1)]

    def paired(i: int, j: int, beside: int) -> int:
        return (1 if is_comma(source[i]) else unit * unit) + unit * beside + best[i + 1][j + 1][1]

    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            apart = max(best[i + 1][j][0], best[i][j + 1][0])
            best[i][j] = (apart, apart)
            if source[i] == target[j]:
                best[i][j] = (max(apart, paired(i, j, 0)), max(apart, paired(i, j, 1)))
    pairs: list[tuple[int, int]] = []
    i = j = beside = 0
    while i < len(source) and j < len(target):
        if source[i] == target[j] and best[i][j][beside] == paired(i, j, beside):
            pairs.append((i, j))
            i, j, beside = i + 1, j + 1, 1
        elif best[i + 1][j][0] >= best[i][j + 1][0]:
            i, beside = i + 1, 0
        else:
            j, beside = j + 1, 0
    return pairs


def _in_order_of(source: Prompt, target: Prompt) -> list[int]:
    """The source's words, with the tags that the target has too in the order that they have there.

    Those tags trade places among themselves; every other word keeps its own.
    """
    source_tags, target_tags = split_tags(source), split_tags(target)
    source_texts = [tag_text(source, tag) for tag in source_tags]
    target_texts = [tag_text(target, tag) for tag in target_tags]
    pairs = _match(source_texts, target_texts)
    free = set(range(len(source_tags))) - {n for n, _ in pairs}
    for m in sorted(set(range(len(target_tags))) - {m for _, m in pairs}):
        n = next((n for n in sorted(free) if source_texts[n] == target_texts[m]), None)
        if n is not None:
            free.remove(n)
            pairs.append((n, m))
    tags = [source_tags[n] for n, _ in sorted(pairs, key=lambda pair: pair[1])]
    places_of_tags = sorted(source_tags[n][0] for n, _ in pairs)
    placed = dict(zip(places_of_tags, tags, strict=True))
    inside = {word for tag in tags for word in tag[1:]}
    places = [place for place in range(len(source.words)) if place not in inside]
    return [word for place in places for word in placed.get(place, (place,))]


def _moved(source: Prompt, target: Prompt, matches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Words of the tags that stand in both prompts and that the matches leave out on both sides.

    Such a tag changed places with one that was edited. The comma beside it comes along.
    """
    sources, targets = {i for i, _ in matches}, {j for _, j in matches}
    source_tags = [tag for tag in split_tags(source) if sources.isdisjoint(tag)]
    target_tags = [tag for tag in split_tags(target) if targets.isdisjoint(tag)]
    moved: list[tuple[int, int]] = []
    for target_tag in target_tags:
        for source_tag in source_tags:
            if tag_text(source, source_tag) != tag_text(target, target_tag) or not (
                sources.isdisjoint(source_tag) and targets.isdisjoint(target_tag)
            ):
                continue
            pairs = list(zip(source_tag, target_tag, strict=True))
            commas = _free_comma(source, source_tag, sources), _free_comma(target, target_tag, targets)
            if commas[0] is not None and commas[1] is not None:
                pairs.append((commas[0], commas[1]))
            moved += pairs
            sources.update(i for i, _ in pairs)
            targets.update(j for _, j in pairs)
    return moved


def _free_comma(prompt: Prompt, tag: Tag, taken: set[int]) -> int | None:
    """The comma right after a tag, or else right before it, unless both are taken."""
    beside = [word for word in (tag[-1] + 1, tag[0] - 1) if 0 <= word < len(prompt.words)]
    free = (word for word in beside if is_comma(prompt.words[word].text) and word not in taken)
    return next(free, None)


def _swaps(
    source: Prompt,
    target: Prompt,
    old_run: Sequence[int],
    new_run: Sequence[int],
    tags: tuple[set[Tag], set[Tag]],
) -> list[tuple[Tag, Tag]]:
    """What is swapped for what where a run of the source's words faces a run of the target's.

    tags: all of both prompts. Runs of whole tags pair tag by tag as far as both go. Punctuation around a run
    stays out of it.
    """
    old_tags, new_tags = split_tags(source, old_run), split_tags(target, new_run)
    whole = tags[0].issuperset(old_tags) and tags[1].issuperset(new_tags)
    trimmed = trim(source, old_run), trim(target, new_run)
    runs = zip(old_tags, new_tags, strict=False) if whole else [trimmed]
    swaps: list[tuple[Tag, Tag]] = []
    for old, new in runs:
        if len(old) == len(new):
            swaps += [((i,), (j,)) for i, j in zip(old, new, strict=True)]
        elif old and new:
            swaps.append((old, new))
    return swaps


def token_mapping(source: Prompt, target: Prompt, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """The alignment of words, written for tokens.

    Paired words with equal token counts pair their tokens one to one; with unequal counts each target
    token takes 1 / len(target tokens) of every source token, as in the paper's code, so that the attention
    paid to the pair stays the same in sum. Start tokens map to start tokens, end to end, and so do templates
    token by token; padding keeps its position in the chunk, and a target's padding at j takes the source's at
    max(j, first padding of the source). A target chunk that the source lacks takes these from the source's
    last chunk. Several text encoders are mapped each for itself.

    Returns M (source tokens, target tokens) float32, column j says where target token j takes its map from;
    and inherits (target tokens,) float32, 1 where column j takes the source's map, 0 where it keeps its own.
    """
    mapping = torch.zeros(source.length, target.length)
    for number in {chunk.stream: None for chunk in target.chunks}:
        origins, chunks = source.stream(number), target.stream(number)
        if not origins:
            continue
        for pairing in alignment.pairings:
            rows = _tokens(source, pairing.source, origins)
            columns = _tokens(target, pairing.target, chunks)
            if len(rows) == len(columns):
                mapping[rows, columns] = 1.0
            elif rows and columns:
                mapping[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1.0 / len(columns)
        for n, chunk in enumerate(chunks):
            for row, column in _beside_words(origins[min(n, len(origins) - 1)], chunk):
                mapping[row, column] = 1.0
    return mapping, (mapping != 0).any(0).float()


def _tokens(prompt: Prompt, words: Sequence[int], chunks: Sequence[Chunk]) -> list[int]:
    """Tokens of some words, those of one text encoder."""
    inside = range(chunks[0].begin, chunks[-1].stop)
    return [token for word in words for token in prompt.words[word].tokens if token in inside]


def _beside_words(source: Chunk, target: Chunk) -> Iterator[tuple[int, int]]:
    """Which tokens of a source's chunk those of a target's that are no words' take their maps from."""
    before, behind = source.first - source.start, source.padding - source.end
    if before:
        for column in range(target.start, target.first):
            yield source.start + min(column - target.start, before - 1), column
    if behind:
        for column in range(target.end, target.padding):
            yield source.end + min(column - target.end, behind - 1), column
    last = source.stop - 1
    for column in range(target.padding, target.stop):
        yield min(max(source.begin + column - target.begin, source.padding), last), column
    for column in range(target.begin, target.start):
        yield min(source.begin + column - target.begin, max(source.start - 1, source.begin)), column
