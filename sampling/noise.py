"""One noise per pair at every stochastic step."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.k_diffusion import sampling as k_diffusion
from torch import Tensor

from .host import BrownianTreeNoiseSampler, default_noise_sampler, inpainting_noise
from .latents import tie_rows

NoiseSampler = Callable[[Any, Any], Tensor]


def tied_noise(
    sampler: Any, noise: Tensor, branches: int, sigmas: Tensor, extra_args: dict
) -> dict[str, Any]:
    """The attributes of a SAMPLER that a run is to change so that each target gets its source's noise.

    A source gets the noise of a plain run of the sources. noise (pairs x branches, ...): for its shape and
    device.
    """
    function = getattr(sampler, "sampler_function", None)
    options = getattr(sampler, "extra_options", None)
    changed: dict[str, Any] = {}
    if function is not None and options is not None and takes_noise_sampler(function):
        given = options.get("noise_sampler")
        if given is not None:
            changed["extra_options"] = {**options, "noise_sampler": _draws(given, branches)}
        elif _is_hosts(function):
            draw = _tied_noise_sampler(function, noise, branches, sigmas, extra_args.get("seed"))
            changed["extra_options"] = {**options, "noise_sampler": draw}
        else:
            function, ties = with_tied_factories(function, noise.shape[0], branches)
            changed["sampler_function"] = function
            if not ties:
                logging.warning(
                    "[prompt-to-prompt] The sampler %s makes noise in a way that cannot be tied: it gets "
                    "Gaussian noise instead, so that source and target get the same.",
                    getattr(function, "__name__", type(sampler).__name__),
                )
                draw = _tied_noise_sampler(function, noise, branches, sigmas, extra_args.get("seed"))
                changed["extra_options"] = {**options, "noise_sampler": draw}
    if function is not None and getattr(sampler, "inpaint_options", {}).get("random", False):
        changed["sampler_function"] = _with_tied_inpainting(function, branches)
    return changed


def takes_noise_sampler(function: Callable) -> bool:
    """Whether a sampler function can be given the noise of its stochastic steps."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.name == "noise_sampler" for p in parameters):
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters) and any(
        _has_noise_sampler(value) for _, value in _uses(function)
    )


def _is_hosts(function: Callable) -> bool:
    return inspect.unwrap(function).__module__.startswith("comfy.")


def _has_noise_sampler(value: Any) -> bool:
    return inspect.isfunction(value) and "noise_sampler" in inspect.signature(value).parameters


def _draws(noise_sampler: NoiseSampler, branches: int) -> NoiseSampler:
    return lambda sigma, sigma_next: tie_rows(noise_sampler(sigma, sigma_next), branches)


def _tied_noise_sampler(
    function: Callable, noise: Tensor, branches: int, sigmas: Tensor, seed: int | None
) -> NoiseSampler:
    """The noise sampler that a function of the host would make for the sources, for all branches."""

    @functools.cache
    def of_sources() -> NoiseSampler:
        """Made when it is first used: some cannot be made for a list of sigmas without a step."""
        sources = noise[::branches]
        if any(user is BrownianTreeNoiseSampler for _, user in _uses(function)):
            cpu = not getattr(function, "__name__", "").endswith("_gpu")
            lowest = sigmas[sigmas > 0].min()
            return BrownianTreeNoiseSampler(sources, lowest, sigmas.max(), seed=seed, cpu=cpu)
        return default_noise_sampler(sources, seed=seed)

    return lambda sigma, sigma_next: of_sources()(sigma, sigma_next).repeat_interleave(branches, dim=0)


def with_tied_factories(function: Callable, rows: int, branches: int) -> tuple[Callable, bool]:
    """A sampler function of another pack that makes its own kind of noise for the sources, and repeats it.

    What it calls to make a noise sampler, by a name that says so ("PyramidNoiseSampler",
    "make_noise_sampler"), is called with the sources' rows where it would get all rows; the pack's module
    stays as it is. The second result is whether there is such a name; without one the function is returned
    unchanged.
    """
    inner = inspect.unwrap(function)
    if not inspect.isfunction(inner):
        return function, False
    replaced: dict[str, Any] = {}
    hands_on = not _has_noise_sampler(inner)  # to a function that makes the noise
    for name, value in _uses(inner, deep=False):
        if callable(value) and "noisesampler" in name.lower().replace("_", ""):
            replaced[name] = _of_sources(value, rows, branches)
        elif hands_on and _has_noise_sampler(value):
            deeper, ties = with_tied_factories(value, rows, branches)
            if ties:
                replaced[name] = deeper
    if not replaced:
        return function, False
    copy = types.FunctionType(
        inner.__code__,
        {**inner.__globals__, **replaced},
        inner.__name__,
        inner.__defaults__,
        inner.__closure__,
    )
    copy.__kwdefaults__ = inner.__kwdefaults__
    return torch.no_grad()(functools.update_wrapper(copy, inner)), True


def _of_sources(factory: Callable, rows: int, branches: int) -> Callable:
    """What makes a noise sampler for a batch of `rows` rows, from what makes one for its sources."""

    @functools.wraps(factory, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        def sources(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows
            return value[::branches] if whole else value

        made = factory(*map(sources, args), **{name: sources(value) for name, value in kwargs.items()})
        return lambda *step, **options: made(*step, **options).repeat_interleave(branches, dim=0)

    return make


def _with_tied_inpainting(function: Callable, branches: int) -> Callable:
    """A sampler function of the host whose noise outside an inpainting mask is one per pair.

    Samplers that inpaint with noise of their own (ddim) draw it for every row of the batch; the sources get
    what a plain run of them draws, and each target its source's.
    """

    @functools.wraps(function)
    def tied_inpainting(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        noise = inpainting_noise(x[::branches], kwargs.get("extra_args", {}).get("seed", 41))
        model.noise = noise.to(model.noise).repeat_interleave(branches, dim=0)
        return function(model, x, *args, **kwargs)

    return tied_inpainting


def _uses(
    function: Callable, seen: frozenset = frozenset(), deep: bool = True
) -> Iterator[tuple[str, Any]]:
    """What a sampler function refers to by name; deep: and those that it hands its noise sampler to."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return
    for name in code.co_names:
        value = function.__globals__.get(name, getattr(k_diffusion, name, None))
        yield name, value
        if deep and value is not None and _has_noise_sampler(value):
            yield from _uses(value, seen | {code})
