"""Copies of a device's tensors in the computer's memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import host


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory, made while a GPU goes on if that memory is pinned."""
    if not _pins(x):
        return x.to("cpu", copy=True)
    host = host_memory(x)
    return host.copy_(x, non_blocking=host.is_pinned())


def host_memory(x: Tensor) -> Tensor:
    """Host memory for a copy of x: pinned, or ordinary memory where the system pins no more."""
    try:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(x.shape, dtype=x.dtype)


def host_bytes(x: Tensor) -> int:
    """Bytes that `to_host` takes for x, or that x takes there: PyTorch pins blocks of powers of two."""
    return 1 << (x.nbytes - 1).bit_length() if _pins(x) or x.is_pinned() else x.nbytes


def _pins(x: Tensor) -> bool:
    return x.device.type == "cuda" and host.pins_memory()
