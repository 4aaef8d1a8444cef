"""What the targets of one forward take from their source: the value that every method gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["self", "cross", "joint", "text", "reference", "features"]
"""self: over the image alone. cross: from image to text. joint: one softmax over text and image. The others
are found in transformers beside these and nothing is taken in them. text: over text alone. reference: over
reference images alone. features: over what the text encoder gave for one token."""


@dataclass(frozen=True, eq=False)
class CrossStep:
    """How cross-attention maps are edited at one step, for N targets and conditionings of t tokens.

    moved: M diag(from_source), (N, t, t), or None where no target takes anything from the source.
    own: (N, t), or None where no target keeps anything of its own.
    weight: (N,), of the general window; for tokens that other nodes append inside the attention of both
        branches.
    unscaled: the same without re-weighting, or None where no word is re-weighted.
    gain: (N, t), the re-weighting of each token at this step where both parts of its column are scaled alike,
        as one softmax over text and image wants it; None where no word is re-weighted.
    """

    moved: Tensor | None
    own: Tensor | None
    weight: Tensor
    unscaled: CrossStep | None = None
    gain: Tensor | None = None

    def by_row(self, branch: Tensor) -> CrossStep:
        """With an entry for each row that is a target's, in place of one for each target.

        branch: (r,) the number of each row's target.
        """
        return self._each(lambda table: table.index_select(0, branch))

    def to(self, device: torch.device, dtype: torch.dtype) -> CrossStep:
        return self._each(lambda table: table.to(dtype).to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> CrossStep:
        return CrossStep(
            None if self.moved is None else change(self.moved),
            None if self.own is None else change(self.own),
            change(self.weight),
            None if self.unscaled is None else self.unscaled._each(change),
            None if self.gain is None else change(self.gain),
        )


@dataclass(frozen=True)
class Layer:
    """One attention layer of a network.

    block: of a U-Net, as the host's patches name it: "input", "middle" or "output", number, depth. Of a
        transformer: number of the stage (`Family.stages`) and of the block in it.
    scale: how much smaller the sides of its grid are than the latent's.
    """

    kind: Kind
    block: tuple[str | int, ...]
    scale: int


@dataclass(frozen=True)
class SelfTaken:
    """What the targets take in some self-attention layers.

    kind: "map": the source's map on the target's own values (Hertz et al. 2023, section 4); in a joint
        softmax the image's part of it. "mutual": the source's keys and values for the target's own queries
        (Cao et al. 2023).
    weights: how much of it each of the N targets takes, from 0 to 1; the rest is its own.
    layers: these layers.
    largest: for each target the largest side of a layer's grid in which it takes, as a fraction of the
        latent's.
    everywhere: in every conditioning of the forward, negative prompts included, or in the pair's own only.
    """

    kind: Literal["map", "mutual"]
    weights: tuple[float, ...]
    layers: tuple[Layer, ...]
    largest: tuple[float, ...]
    everywhere: bool = False


@dataclass(frozen=True, eq=False)
class Taken:
    """All that the targets of one forward take from their source.

    cross: in the cross-attention of every layer, and the text's columns of joint attention, in the pair's own
        conditioning; None where it is left alone.
    self_: in self-attention and joint attention; a layer is in at most one of the entries for a target.
    features: the output block whose residual features are the source's (Tumanyan et al. 2023), or None.
    """

    cross: CrossStep | None = None
    self_: tuple[SelfTaken, ...] = ()
    features: int | None = None

    def __bool__(self) -> bool:
        return self.cross is not None or bool(self.self_) or self.features is not None


NOTHING = Taken()


def together(takens: Sequence[Taken]) -> Taken:
    """What several methods take; at most one of them in cross-attention, and one of the features."""
    cross = next((taken.cross for taken in takens if taken.cross is not None), None)
    features = next((taken.features for taken in takens if taken.features is not None), None)
    return Taken(cross, tuple(part for taken in takens for part in taken.self_), features)
