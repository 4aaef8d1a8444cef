"""Where the processor waits for the device that computes: every wait ends the lead that it has over a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero)


class Reads(TorchDispatchMode):
    """Notes what brings values from a device to the program while it is open.

    Single values, comparisons of tensors and positions of what is not zero; on a GPU also copies to host
    memory, unless they go on by themselves (non_blocking).

    found: the operations. forbidden: whether a read raises RuntimeError instead.
    """

    def __init__(self, device: torch.device, forbidden: bool = False):
        super().__init__()
        self.device, self.forbidden = device, forbidden
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(x, torch.Tensor) and x.device.type == self.device.type for x in args) and (
            func.overloadpacket in READING or self._downloads(func, result, args, kwargs)
        ):
            if self.forbidden:
                raise RuntimeError(f"{func} reads from the device")
            self.found.append(str(func))
        return result

    def _downloads(self, func: Any, result: Any, args: tuple, kwargs: dict) -> bool:
        names = [argument.name for argument in func._schema.arguments]
        if self.device.type == "cpu" or dict(zip(names, args, strict=False), **kwargs).get("non_blocking"):
            return False
        return isinstance(result, torch.Tensor) and result.device.type == "cpu"


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """The places in the code that wait for the device while this is open, one for each time.

    On a GPU they are what PyTorch tells of: reads, and uploads from ordinary memory too. On a CPU, where
    nothing waits, the operations of `Reads` stand in for them.
    """
    if device.type != "cuda":
        with Reads(device) as reads:
            yield reads.found
        return
    places: list[str] = []

    def note(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if "synchronizing CUDA operation" in str(message):
            places.append(f"{filename}:{lineno}")

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Whatever waits for the device while this is open raises RuntimeError; on a CPU, what reads a value."""
    if device.type != "cuda":
        with Reads(device, forbidden=True):
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
