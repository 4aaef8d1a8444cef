"""What the pack does inside a step: which layers' maps are injected, and the time of its own work in them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SLOTS = {"cross_attention": "cross-attention", "self_attention": "self-attention"}
"""The functions through which maps are injected, by name, and what they inject."""


@dataclass
class Watch:
    """Injected attention while it is watched.

    layers: calls of the layers, by kind. twice: those of them that needed a second attention call for what
    the targets keep of their own. spent: seconds of `clock` in these layers, in the attention call that the
    host would have made too ("attention"), in the second one ("second"), and in all ("all").
    """

    clock: Callable[[], float]
    layers: Counter[str] = field(default_factory=Counter)
    twice: Counter[str] = field(default_factory=Counter)
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def around(self, kind: str, inject: Callable) -> Callable:
        def timed(name: str, function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = self.clock()
                result = function(*args, **kwargs)
                self.spent[name] += self.clock() - start
                if name == "second":
                    self.twice[kind] += 1
                return result

            return call

        def watched(attend: Callable, attend_own: Callable, *args: Any, **kwargs: Any) -> Any:
            self.layers[kind] += 1
            return timed("all", inject)(
                timed("attention", attend), timed("second", attend_own), *args, **kwargs
            )

        return watched

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        from p2p.sampling import attentions

        before = {name: getattr(attentions, name) for name in SLOTS}
        for name, kind in SLOTS.items():
            setattr(attentions, name, self.around(kind, before[name]))
        try:
            yield self
        finally:
            for name, function in before.items():
                setattr(attentions, name, function)


def paths_table(
    bench: Any, variants: dict[str, Any], title: str, steps: int = 20, size: int = 64
) -> str:
    """How often each path is taken in a whole run; the same at all sizes. The plain batch is the first."""
    layers = 0
    lines = [
        f"**{title}, the default tau, {steps} steps**",
        "",
        "| | cross-attention injected | with a second call | self-attention injected | attention calls "
        "| rows in them |",
        "|---|---|---|---|---|---|",
    ]
    for name, variant in variants.items():
        with Watch(lambda: 0.0).watching() as watch:
            found = bench.calls(variant, size, steps)
        layers = layers or found["calls"] // 2
        cross, twice, self_ = watch.layers["cross-attention"], watch.twice, watch.layers["self-attention"]
        lines.append(
            f"| {name} | {cross} of {layers} ({cross / layers:.0%}) | {twice['cross-attention']} "
            f"| {self_} of {layers} ({self_ / layers:.0%}) | {found['calls']} | {found['rows']} |"
        )
    return "\n".join(lines)


def work_table(
    bench: Any, variants: dict[str, Any], title: str, size: int, steps: int, clock: Callable[[], float]
) -> str:
    """Time of the pack's own work in a step in which everything is injected."""
    lines = [
        f"**{title}, {size} px, one target, {steps} timed steps**",
        "",
        "| | rows laid out and values moved | second attention call |",
        "|---|---|---|",
    ]
    for name, variant in variants.items():
        marks: list[tuple[float, dict[str, float]]] = []
        with Watch(clock).watching() as watch:

            def mark(marks: list = marks, watch: Watch = watch) -> None:
                marks.append((clock(), dict(watch.spent)))

            bench.run(variant, size, steps + 1, mark)
        (start, before), (end, after) = marks[0], marks[-1]
        step, spent = end - start, {key: after[key] - before.get(key, 0.0) for key in after}
        second = spent.get("second", 0.0)
        moved = spent["all"] - spent["attention"] - second
        lines.append(f"| {name} | {moved / step:.2%} | {second / step:.2%} |")
    return "\n".join([*lines, "", "Parts of the whole step's time."])
