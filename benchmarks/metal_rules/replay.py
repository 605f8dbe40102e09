"""A trace, replayed: which kernels MLX launches for it, in order.

Raises UnknownRule for an operation without a rule: nothing is left out silently.
"""

from __future__ import annotations

from benchmarks.metal_rules import UnknownRule
from benchmarks.metal_rules.calls import CALLS
from benchmarks.metal_rules.chips import Chip
from benchmarks.metal_rules.kernels import Kernel
from benchmarks.metal_rules.launches import Launches
from benchmarks.metal_rules.operations import ELEMENTWISE, RULES
from benchmarks.metal_rules.standins import Operation, Trace


def replay(trace: Trace, chip: Chip) -> list[Kernel]:
    """Return the kernels that MLX launches for a trace on a chip."""
    at = Launches(trace, chip)
    for operation in trace.operations:
        _run(at, operation)
    _add_merged(at)
    return at.kernels


def _run(at: Launches, o: Operation) -> None:
    rule = RULES.get(o.name) if o.call is None else CALLS.get(o.call.name)
    if rule is None:
        raise UnknownRule(f"no rule for MLX's {o.name} {o.arguments}")
    rule(at, o)
    for array in o.outputs:
        at.of(array)


def _add_merged(at: Launches) -> None:
    """Launch again what the exporter merged, where it is plain which operations those were.

    A node that stands for two has two readers at least; if there are no more such nodes than
    were merged, each stands for one more.
    """
    for name, extra in at.trace.merged.items():
        twice = [k for k, output in at.drawn if k.name == name and at.held[output] > 1]
        if name not in ELEMENTWISE or len(twice) != extra:
            raise UnknownRule(f"the exporter merged {extra} {name}: it is not plain which")
        at.kernels += twice
