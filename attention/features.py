"""What a target takes from its source as it is: the network's features, keys and values of self-attention."""

from __future__ import annotations

from torch import Tensor

from .inject import Attention, Rows, SelfStep, mixed_with_own


def source_features(features: Tensor, rows: Rows) -> Tensor:
    """Features of a layer with the source's in the targets' rows: f_t = f_s.

    features (b, channels, height, width). Source: Tumanyan et al. 2023, section 4, feature injection.
    """
    return features.index_select(0, rows.origin)


def mutual_self_attention(
    attend: Attention, attend_own: Attention, q: Tensor, k: Tensor, v: Tensor, step: SelfStep
) -> Tensor:
    """Self-attention in which the targets look at their source: own queries, the source's keys and values.

        weight softmax(Q_t K_s^T / sqrt(d)) V_s + (1 - weight) softmax(Q_t K_t^T / sqrt(d)) V_t

    Arguments as in `self_attention`. Source: Cao et al. 2023 (MasaCtrl), mutual self-attention control.
    """
    origin = step.rows_of(k).origin
    out = attend(q, k.index_select(0, origin), v.index_select(0, origin))
    return mixed_with_own(out, attend_own, q, k, v, step)
