"""Who measures when: every runtime in turn, another one first in each round, one at a time.

Knows order and failure: who fails is left out of what follows, if the caller allows that. Knows no
runtime, no ratio and no report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from fastvlm_mlx.bench.harness import Say, Tally
from fastvlm_mlx.bench.inputs import InputFiles
from fastvlm_mlx.bench.peer_process import PATIENCE_S
from fastvlm_mlx.bench.peer_runtime import Contender, PeerRuntime, Weights, start_cold
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.errors import FastVLMError

Item = TypeVar("Item")
Dropped = Callable[[str, FastVLMError], None]
"""Hears which runtime failed and why; it is out, and the others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often what is done. Of the `rounds`, the first ones are profiled and ask a second turn.

    `warm_up` is answered before, its figures forgotten; by default it is each case itself.
    `cold_runs` fresh processes of each runtime answer `cold`, by default the first case.
    """

    rounds: int
    warm_up_runs: int = 1
    warm_up: Case | None = None
    profiled_rounds: int | None = None
    second_turns: int = 0
    cold_runs: int = 0
    cold: Case | None = None
    photo: bool = False
    patience_s: float = PATIENCE_S


@dataclass(slots=True)
class Turns:
    """Some runtimes, ours first, and what each took so far, by name, then by case.

    `tallies` has the figures of METRICS, `beyond` others: the whole answer's processor time, and
    where the system tells it the most memory the process held during an answer.

    Who fails is told to `dropped` and keeps the rounds it had. FastVLMError is raised without
    `dropped`, if it is ours that fails, and if nothing is left to compare ours with. `left_out` has
    by case what nobody is asked since somebody cannot do it, and why.
    """

    runtimes: list[PeerRuntime]
    cases: Sequence[Case]
    plan: Plan
    say: Say
    dropped: Dropped | None
    tallies: dict[str, list[Tally]]
    beyond: dict[str, list[dict[str, list[float]]]]
    left_out: dict[Case, dict[str, str]]

    @classmethod
    def among(
        cls,
        runtimes: Sequence[PeerRuntime],
        cases: Sequence[Case],
        plan: Plan,
        *,
        say: Say = lambda _: None,
        dropped: Dropped | None = None,
    ) -> Turns:
        """Return turns that nobody has taken yet."""
        names = [runtime.name for runtime in runtimes]
        return cls(
            list(runtimes),
            cases,
            plan,
            say,
            dropped,
            {name: [Tally(case) for case in cases] for name in names},
            {name: [{} for _ in cases] for name in names},
            {case: {} for case in cases},
        )

    def take(self) -> None:
        """Prepare and warm up every runtime, then measure round by round."""
        plan = self.plan
        for runtime in list(self.runtimes):
            with self._dropped_if_it_fails(runtime):
                for case in self.cases:
                    runtime.prepare(case)
                    for request, why in runtime.cannot(case).items():
                        self.left_out[case].setdefault(request, f"{runtime.name}: {why}")
                for case in self.cases if plan.warm_up is None else [plan.warm_up]:
                    for _ in range(plan.warm_up_runs):
                        self.say(f"warm-up: {runtime.name}, {case.name}")
                        runtime.ttft(case)
        for number in range(plan.rounds):
            for place, case in enumerate(self.cases):
                for runtime in rotated(self.runtimes, number):
                    self.say(f"round {number + 1} of {plan.rounds}: {runtime.name}, {case.name}")
                    with self._dropped_if_it_fails(runtime):
                        self._measure(runtime, place, number)

    def notes(self) -> tuple[str, ...]:
        """Return a line for each figure that the plan has and a case has not, with the reason."""
        planned = {
            "stages": ("profile", self._profiled),
            "second turn": ("second_turn", self.plan.second_turns),
        }
        return tuple(
            f"{case.name}: no {figure}, as not all can be asked ({self.left_out[case][request]})"
            for case in self.cases
            for figure, (request, rounds) in planned.items()
            if rounds and request in self.left_out[case]
        )

    @property
    def _profiled(self) -> int:
        plan = self.plan
        return plan.rounds if plan.profiled_rounds is None else plan.profiled_rounds

    def _measure(self, runtime: PeerRuntime, place: int, number: int) -> None:
        """Run one case once, add what it took: all of it, or nothing if something fails."""
        case, left_out = self.cases[place], self.left_out[self.cases[place]]
        measured, held = runtime.ttft(case), runtime.memory()
        figures: dict[str, float | None] = {
            "ttft_ms": measured.ttft_ms,
            "decode_tps": measured.decode_tps,
            "peak_bytes": measured.peak_bytes,
            "resident_bytes": held.get("resident_bytes"),
        }
        if number < self._profiled and "profile" not in left_out:
            figures |= runtime.profile(case)
        if number < self.plan.second_turns and "second_turn" not in left_out:
            figures["second_turn_ttft_ms"] = runtime.second_turn(case).ttft_ms
        tally = self.tallies[runtime.name][place]
        tally.token_ids, tally.prompt_tokens = measured.token_ids, measured.prompt_tokens
        tally.add(**figures)
        beyond = self.beyond[runtime.name][place]
        beyond.setdefault("answer_cpu_ms", []).append(measured.cpu_s * 1000)
        if "peak_resident_bytes" in held:
            beyond.setdefault("peak_resident_bytes", []).append(held["peak_resident_bytes"])

    @contextmanager
    def _dropped_if_it_fails(self, runtime: PeerRuntime) -> Iterator[None]:
        try:
            yield
        except FastVLMError as error:
            if self.dropped is None or runtime is self.runtimes[0]:
                raise
            self.runtimes.remove(runtime)
            runtime.close()
            _, *others = self.beyond
            if len(self.runtimes) == 1 and not any(self.beyond[name][0] for name in others):
                raise
            self.dropped(runtime.name, error)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """Return the items with number `by`, counted round and round, first."""
    first = by % len(items)
    return [*items[first:], *items[:first]]


def start_in_turn(
    contenders: Sequence[Contender],
    weights: Weights,
    case: Case,
    files: InputFiles,
    plan: Plan,
    *,
    ready: Callable[[], None],
    say: Say,
    dropped: Dropped | None,
) -> dict[str, dict[str, list[float]]]:
    """Start every contender cold `plan.cold_runs` times; return figures by name of contender.

    `ready` is called before each start.
    """
    found: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in contenders}
    left = list(contenders)
    for number in range(plan.cold_runs):
        for contender in rotated(left, number):
            say(f"cold start {number + 1} of {plan.cold_runs}: {contender.name}")
            ready()
            try:
                took = start_cold(contender, weights, case, files, patience_s=plan.patience_s)
            except FastVLMError as error:
                if dropped is None or contender is contenders[0]:
                    raise
                left.remove(contender)
                dropped(contender.name, error)
                continue
            for figure, value in took.items():
                found[contender.name].setdefault(figure, []).append(value)
    return found
