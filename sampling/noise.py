"""One noise per pair at every stochastic step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.k_diffusion import sampling as k_diffusion
from einops import repeat
from torch import Tensor

NoiseSampler = Callable[[Any, Any], Tensor]


def takes_noise_sampler(function: Callable) -> bool:
    """Whether a sampler function can be given the noise of its stochastic steps."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.name == "noise_sampler" for p in parameters):
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters) and any(map(_has_noise_sampler, _uses(function)))


def _has_noise_sampler(value: Any) -> bool:
    return inspect.isfunction(value) and "noise_sampler" in inspect.signature(value).parameters


def tied_noise_sampler(
    function: Callable, noise: Tensor, branches: int, sigmas: Tensor, seed: int | None
) -> NoiseSampler:
    """The noise sampler that `function` would make for the sources alone, repeated over the branches.

    So a source gets the noise of a plain run of the sources, and each target gets its source's.

    function: a sampler function of the host. noise: (pairs x branches, ...), for shape and device.
    """

    @functools.cache
    def of_sources() -> NoiseSampler:
        """Made when it is first used: some cannot be made for a list of sigmas without a step."""
        sources = noise[::branches]
        if any(user is k_diffusion.BrownianTreeNoiseSampler for user in _uses(function)):
            cpu = not getattr(function, "__name__", "").endswith("_gpu")
            lowest = sigmas[sigmas > 0].min()
            return k_diffusion.BrownianTreeNoiseSampler(sources, lowest, sigmas.max(), seed=seed, cpu=cpu)
        return k_diffusion.default_noise_sampler(sources, seed=seed)

    def draw_tied(sigma: Any, sigma_next: Any) -> Tensor:
        return repeat(of_sources()(sigma, sigma_next), "b ... -> (b n) ...", n=branches)

    return draw_tied


def with_tied_inpainting(function: Callable, branches: int) -> Callable:
    """A sampler function of the host whose noise outside an inpainting mask is one per pair.

    Samplers that inpaint with noise of their own (ddim) draw it for every row of the batch; the sources get
    what a plain run of them draws, and each target its source's.
    """

    @functools.wraps(function)
    def tied(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        generator = torch.manual_seed(kwargs.get("extra_args", {}).get("seed", 41) + 1)  # as the host does
        noise = torch.randn((x.shape[0] // branches, *x.shape[1:]), generator=generator, device="cpu")
        model.noise = repeat(noise.to(model.noise), "b ... -> (b n) ...", n=branches)
        return function(model, x, *args, **kwargs)

    return tied


def _uses(function: Callable, seen: frozenset = frozenset()) -> Iterator[Any]:
    """What a sampler function, and those that it hands its noise sampler to, refer to by name."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return
    for name in code.co_names:
        value = function.__globals__.get(name, getattr(k_diffusion, name, None))
        yield value
        if value is not None and _has_noise_sampler(value):
            yield from _uses(value, seen | {code})
