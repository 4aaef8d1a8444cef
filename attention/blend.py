"""Local blend: where the target may differ from its source, from where words look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit
from .maps import Tokens
from .prompt import split_words


@dataclass(frozen=True, eq=False)
class LocalBlend:
    """Keeps the target equal to its source outside of words' regions, outside of a given mask, or of both.

    words: words or phrases of the target whose regions may change; source_words: of the source, likewise.
    exclude: words or phrases of either whose regions must not.
    threshold: a pixel belongs to a phrase where its map is above this fraction of the map's maximum, 0 to 1.
    start: fraction of the run from which on the blend acts, 0 to 1.
    softness: width of the mask's soft edge, as a fraction of the maximum, 0 for a hard one.
    mask: (masks, height, width), 1 where the target may change; one for all pairs or one for each.

    Raises ValueError for numbers out of range, and where there are neither words nor a mask.
    Source: Hertz et al. 2023, section 4 and `LocalBlend` in the authors' code.
    """

    words: tuple[str, ...] = ()
    source_words: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    threshold: float = 0.3
    start: float = 0.2
    softness: float = 0.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "start", "softness"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value:g}; expected a number from 0 to 1.")
        if not self.words and not self.source_words and self.mask is None:
            raise ValueError(
                "The blend has nothing to go by: name words of the target or of the source, or give a mask."
            )
        if self.mask is not None and self.mask.ndim != 3:
            raise ValueError(
                f"The mask has shape {tuple(self.mask.shape)}; expected (masks, height, width)."
            )

    @property
    def needs_maps(self) -> bool:
        return bool(self.words or self.source_words or self.exclude)


def read_blend(
    words: str,
    source_words: str,
    exclude: str,
    threshold: float,
    start: float,
    softness: float = 0.0,
    mask: Tensor | None = None,
) -> LocalBlend:
    """A blend from lists of words or phrases separated by commas."""
    include, taken_away, excluded = (tuple(split_words(text)) for text in (words, source_words, exclude))
    return LocalBlend(include, taken_away, excluded, threshold, start, softness, mask)


@dataclass(frozen=True)
class Region:
    """Tokens of one phrase in the prompt of one branch (0: source)."""

    branch: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Regions:
    """Of one target: the phrases whose regions may change, and those whose regions must not."""

    include: tuple[Region, ...]
    exclude: tuple[Region, ...]


def regions(blend: LocalBlend, edit: Edit) -> tuple[Regions, ...]:
    """For each target the phrases of a blend, found in its prompt and in the source's.

    Raises WordNotFound for a phrase that is nowhere, ValueError for a target that has none of the words.
    """
    targets = range(1, edit.branches)
    include: list[list[Region]] = [[] for _ in edit.targets]
    exclude: list[list[Region]] = [[] for _ in edit.targets]
    for phrase in blend.source_words:
        places = edit.find(phrase, (0,), asked="source_words", advice="write it in words")
        for found in include:
            found.append(Region(0, places[0]))
    for phrase in blend.words:
        places = edit.find(phrase, targets, asked="words", advice="write it in source_words")
        for branch, tokens in places.items():
            include[branch - 1].append(Region(branch, tokens))
    for phrase in blend.exclude:
        places = edit.find(phrase, range(edit.branches), asked="exclude")
        for n, found in enumerate(exclude, 1):
            found += [Region(branch, places[branch]) for branch in (0, n) if branch in places]
    for n, found in enumerate(include):
        if blend.words and not found:
            raise ValueError(
                f'target {n + 1} ("{edit.targets[n].text}") has none of the words '
                f"{', '.join(blend.words)}; name words of every target, or words of the source."
            )
    return tuple(Regions(tuple(i), tuple(e)) for i, e in zip(include, exclude, strict=True))


def tokens_of(found: Sequence[Regions], branches: int) -> Tokens:
    """The tokens of each branch's prompt that the regions are made of."""
    wanted: list[set[int]] = [set() for _ in range(branches)]
    for target in found:
        for region in (*target.include, *target.exclude):
            wanted[region.branch].update(region.tokens)
    return tuple(tuple(sorted(tokens)) for tokens in wanted)


def region_mask(
    found: Regions, maps: Tensor, tokens: Tokens, size: tuple[int, int], threshold: float, softness: float
) -> Tensor:
    """Where one target may differ from its source, (pairs, 1, height, width) from 0 to 1.

    Each phrase's map is the sum of its tokens'; it is max-pooled over 3 x 3 (excluded phrases are not),
    enlarged to the latent's size and divided by its maximum; a pixel is in the region where the result is
    above the threshold. Regions of the words unite, or are everything where no words are given; those of
    excluded words are taken out. With softness s the step at the threshold th becomes a ramp from th - s/2 to
    th + s/2.

    maps (pairs, branches, W, h, w): of the wanted tokens. Unlike the authors' code, which adds all the words'
    maps before the threshold, every phrase has its own maximum, so a strong word does not hide a weak one.
    """

    def mask_of(region: Region, pool: bool) -> Tensor:
        columns = [tokens[region.branch].index(token) for token in region.tokens]
        each = [maps[:, region.branch, column] for column in columns]  # no list of indices to upload
        total = torch.stack(each, dim=1).sum(1, keepdim=True)
        if pool:
            total = F.max_pool2d(total, 3, stride=1, padding=1)
        total = F.interpolate(total, size, mode="bilinear", align_corners=False)
        total = total / total.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
        if softness > 0.0:
            return ((total - threshold) / softness + 0.5).clamp(0.0, 1.0)
        return (total > threshold).to(total.dtype)

    mask = (maps.new_zeros if found.include else maps.new_ones)(maps.shape[0], 1, *size)
    for region in found.include:
        mask = torch.maximum(mask, mask_of(region, pool=True))
    for region in found.exclude:
        mask = mask * (1.0 - mask_of(region, pool=False))
    return mask
