"""What to change: one source prompt, the targets, and the maps that each target inherits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .alignment import Alignment, align, token_mapping
from .prompt import Prompt, WordNotFound, split_words
from .schedule import TauSchedule

GAIN_LIMIT = 2.0


@dataclass(frozen=True, eq=False)
class Source:
    """The prompt that the images start from."""

    prompt: Prompt

    @property
    def text(self) -> str:
        return self.prompt.text


@dataclass(frozen=True, eq=False)
class Target:
    """An edited prompt, and how it inherits the source's cross-attention.

    mapping: M, (source tokens, target tokens): column j says where target token j takes its map from.
    inherits: (target tokens,), 1 where the column takes the source's map, 0 where it keeps its own.
    gain: (target tokens,), the re-weighting scale c of each token's map, 1 for none.
    tau: a schedule of its own, instead of the run's.
    """

    prompt: Prompt
    alignment: Alignment
    mapping: Tensor = field(repr=False)
    inherits: Tensor = field(repr=False)
    gain: Tensor = field(repr=False)
    tau: TauSchedule | None = None

    @property
    def text(self) -> str:
        return self.prompt.text


@dataclass(frozen=True, eq=False)
class Edit:
    """One source and its targets. Branch 0 of a pair is the source, 1..N are the targets."""

    source: Source
    targets: tuple[Target, ...] = ()

    @property
    def branches(self) -> int:
        return 1 + len(self.targets)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt of each branch."""
        return (self.source.prompt, *(target.prompt for target in self.targets))

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Positions of each branch's word tokens: all but start, end and padding."""
        return tuple(
            tuple(token for word in prompt.words for token in word.tokens) for prompt in self.prompts
        )

    def with_target(self, prompt: Prompt, mode: str) -> Edit:
        """This edit with one more target, aligned to the source."""
        alignment = align(self.source.prompt, prompt, mode)
        mapping, inherits = token_mapping(self.source.prompt, prompt, alignment)
        target = Target(prompt, alignment, mapping, inherits, torch.ones(prompt.length))
        return replace(self, targets=(*self.targets, target))

    def reweighted(self, words: str, scale: float, target: int = 0) -> Edit:
        """Scale the maps of words: A*_j = c A_j (Hertz et al. 2023, section 3.2, attention re-weighting).

        words: words or phrases of the target, separated by commas. scale: c in [-2, 2]; scales of several
        calls multiply. target: which one, from 1; 0 for all that have the word.

        Raises WordNotFound if a word is in none of those targets, ValueError for a number out of range or a
        product of scales that is.
        """
        if not -GAIN_LIMIT <= scale <= GAIN_LIMIT:
            raise ValueError(f"scale is {scale:g}; expected a number from {-GAIN_LIMIT:g} to {GAIN_LIMIT:g}.")
        if not 0 <= target <= len(self.targets):
            raise ValueError(
                f"target is {target}, but the edit has {len(self.targets)} targets; "
                f"expected 0 (all) to {len(self.targets)}."
            )
        branches = (target,) if target else range(1, self.branches)
        whose = f"target {target}" if target else "the target that replaces it"
        targets = list(self.targets)
        for phrase in words_to_reweight(words):
            for branch, tokens in self.find(phrase, branches, advice=f"name the word of {whose}").items():
                gain = _scaled(targets[branch - 1].gain, tokens, scale, f'"{phrase}" of target {branch}')
                targets[branch - 1] = replace(targets[branch - 1], gain=gain)
        return replace(self, targets=tuple(targets))

    def without_gain(self) -> Edit:
        """This edit with every map at its own weight: c = 1."""
        targets = (replace(target, gain=torch.ones_like(target.gain)) for target in self.targets)
        return replace(self, targets=tuple(targets))

    def find(
        self,
        phrase: str,
        branches: Iterable[int],
        *,
        asked: str = "",
        advice: str = "name the word of the target that replaces it",
    ) -> dict[int, tuple[int, ...]]:
        """Token positions of a word or phrase, for each of the branches whose prompt has it.

        asked: the field that holds the phrase, for the message. advice: what to do if only another branch has
        the phrase.

        Raises WordNotFound, which lists the prompts' words, if none of the branches has it.
        """
        found: dict[int, tuple[int, ...]] = {}
        errors: list[str] = []
        for branch in branches:
            try:
                found[branch] = self.prompts[branch].find(phrase)
            except WordNotFound as error:
                errors.append(str(error))
        if not found:
            says = errors[:2]
            others = [branch for branch, prompt in enumerate(self.prompts) if prompt.contains(phrase)]
            if others:
                where = f"Target {others[0]}" if others[0] else "The source"
                says.append(f"{where} has it; {advice}.")
            raise WordNotFound((f"{asked}: " if asked else "") + " ".join(says))
        return found


def _scaled(gain: Tensor, tokens: Sequence[int], scale: float, word: str) -> Tensor:
    """gain with the tokens' entries times scale. Raises ValueError for a product outside of [-2, 2]."""
    scaled = gain.clone()
    scaled[list(tokens)] *= scale
    highest = int(scaled.abs().argmax())
    if scaled[highest].abs() > GAIN_LIMIT * (1.0 + 1e-6):  # room for rounding
        raise ValueError(
            f"{word} has scale {gain[highest]:g} already; times {scale:g} it is {scaled[highest]:g}, and a "
            f"scale is from {-GAIN_LIMIT:g} to {GAIN_LIMIT:g}. Lower one of the two."
        )
    return scaled.clamp(-GAIN_LIMIT, GAIN_LIMIT)


def words_to_reweight(words: str) -> list[str]:
    """The words or phrases of a list separated by commas. Raises ValueError if there is none."""
    phrases = split_words(words)
    if not phrases:
        raise ValueError("No word was given to re-weight; write one or more words of the target prompt.")
    return phrases


def coefficients(target: Target, weights: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the source's map and of its own map each target token gets at one step.

        A*_j = from_source_j (A_s M)_j + own_j A_t,j
        from_source = w c m          own = w c (1 - m) + (1 - w)

    with w = weights, the tau schedule (t,); m = inherits; c = gain. Outside the window (w = 0) the target's
    own attention is untouched, its gain included. Source: Hertz et al. 2023, equations of section 3.2 and the
    blend of `alpha_words` in the authors' code.

    Returns (from_source, own), each (t,) in the dtype of weights.
    """
    from_source = weights * target.gain * target.inherits
    own = weights * target.gain * (1.0 - target.inherits) + (1.0 - weights)
    return from_source, own
