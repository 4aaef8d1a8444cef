"""The maps of words over a whole run, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit
from .maps import Tokens
from .prompt import split_words

PUBLISHED_SCALE = 4
"""A quarter of the latent's sides (16 x 16 of 64 x 64) is the published resolution for a word's region."""


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Where the words of each branch looked during a run.

    tokens: which tokens of each branch's prompt were read. progress: of each step, from 0 to 1.
    by_scale: for layers whose sides are so many times smaller than the latent's, of each step (pairs, B, W,
        height, width), averaged over these layers and their heads, on the CPU.
    blend: the final mask of the local blend, (pairs, N, height, width), or None.
    size: height and width of the latent. pixels: of an image's sides for each of the latent's, about.
    """

    edit: Edit
    tokens: Tokens
    progress: tuple[float, ...]
    by_scale: dict[int, tuple[Tensor, ...]]
    blend: Tensor | None
    size: tuple[int, int]
    pixels: int = 8

    def phrases(self, branch: int, words: str) -> tuple[list[str], list[tuple[int, ...]]]:
        """Words or phrases of a branch's prompt, separated by commas, and their tokens; all words for none.

        Raises ValueError for a branch that is not there, WordNotFound, which lists the words.
        """
        self._check_branch(branch)
        prompt = self.edit.prompts[branch]
        wanted = split_words(words)
        if wanted:
            return wanted, [prompt.find(phrase) for phrase in wanted]
        return [word.text for word in prompt.words], [word.tokens for word in prompt.words]

    @property
    def nbytes(self) -> int:
        """Memory that the maps take."""
        return sum(maps.nbytes for steps in self.by_scale.values() for maps in steps)

    def layers(self, scale: int) -> int:
        """The scale that is meant by the published one: the nearest that the model has."""
        return nearest(self.by_scale) if scale == PUBLISHED_SCALE else scale

    def blend_of(self, branch: int) -> Tensor | None:
        """The final mask of a target's local blend, (pairs, height, width); for the source any target's."""
        self._check_branch(branch)
        if self.blend is None:
            return None
        return self.blend.amax(1) if branch == 0 else self.blend[:, branch - 1]

    def _check_branch(self, branch: int) -> None:
        if not 0 <= branch < self.edit.branches:
            raise ValueError(
                f"branch is {branch}, but the edit has branches 0 (source) to {self.edit.branches - 1}."
            )

    def of(
        self, branch: int, phrases: Sequence[tuple[int, ...]], scale: int, start: float, end: float
    ) -> Tensor:
        """Maps of phrases, each given by its tokens: (pairs, phrases, h, w), the sums of their tokens' maps.

        scale: of the layers to average over, 0 for all of them, the coarser ones enlarged.
        start, end: part of the run to average over, start <= progress < end.

        Raises ValueError for a branch, a scale or a part of the run without maps.
        """
        self._check_branch(branch)
        steps = [n for n, progress in enumerate(self.progress) if start <= progress < end]
        if not self.progress:
            raise ValueError("The run had no step whose maps could be read.")
        if not steps:
            raise ValueError(
                f"No step of the run lies from {start:g} to {end:g}; its steps are at "
                f"{', '.join(f'{progress:.3g}' for progress in self.progress)}."
            )
        if scale and scale not in self.by_scale:
            raise ValueError(
                f"The model has no attention layers at 1/{scale} of the latent's sides; it has "
                f"{', '.join(f'1/{found}' for found in self.by_scale)}."
            )
        chosen = [self.by_scale[scale]] if scale else list(self.by_scale.values())
        size = chosen[0][0].shape[-2:]
        columns = [[self.tokens[branch].index(token) for token in phrase] for phrase in phrases]
        layers = []
        for maps in chosen:
            mean = torch.stack([maps[n][:, branch] for n in steps]).mean(0)
            found = torch.stack([mean[:, column].sum(1) for column in columns], dim=1)
            layers.append(F.interpolate(found, size, mode="bilinear", align_corners=False))
        return torch.stack(layers).mean(0)


def nearest(scales: Iterable[int]) -> int:
    """The layers' scale that is nearest to the published choice."""
    return min(
        set(scales),
        key=lambda scale: (abs(scale.bit_length() - PUBLISHED_SCALE.bit_length()), scale),
    )
