"""The same work in several runtimes: same weights, files, ids, dtype; in turn, or beside a file.

Knows what must be the same for a ratio to mean anything, and what was not. Each runtime has its own
process and computes only while the others wait (`turns.py`). Knows no runtime and no table
(`ratios.py` has that).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from fastvlm_mlx.bench.file_cache import file_cache_state, read_through
from fastvlm_mlx.bench.harness import Say
from fastvlm_mlx.bench.inputs import InputFiles, input_files
from fastvlm_mlx.bench.peer import PICTURE_ID
from fastvlm_mlx.bench.peer_report import card, once, results
from fastvlm_mlx.bench.peer_runtime import Contender, PeerRuntime, Weights
from fastvlm_mlx.bench.ratios import ratio
from fastvlm_mlx.bench.results import Case, Report, Series, Settings
from fastvlm_mlx.bench.subject import Subject
from fastvlm_mlx.bench.turns import Dropped, Plan, Turns, start_in_turn
from fastvlm_mlx.errors import FastVLMError


@dataclass(frozen=True, slots=True)
class Comparison:
    """Reports of the same work, ours first, and whether it was the same in all.

    `agreement` has lines to print about each other runtime, by its report's name, `notes` lines
    about all. `interleaved`: the n-th measurements of all were neighbours, so ratios are taken
    round by round.
    """

    reports: tuple[Report, ...]
    agreement: dict[str, tuple[str, ...]]
    interleaved: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return one JSON object: reports whole, ratios of ours to each other one, agreement."""
        ours, *others = self.reports
        return {
            "interleaved": self.interleaved,
            "reports": [report.to_json() for report in self.reports],
            "ratios": {
                other.runtime: ratios_json(ours, other, interleaved=self.interleaved)
                for other in others
            },
            "agreement": {name: list(lines) for name, lines in self.agreement.items()},
            "notes": list(self.notes),
        }


def compare(
    contenders: Sequence[Contender],
    subject: Subject,
    cases: Sequence[Case],
    plan: Plan,
    *,
    command: str = "",
    say: Say = lambda _: None,
    dropped: Dropped | None = None,
) -> Comparison:
    """Start every contender, ours first in the list, and measure every case in all of them in turn.

    Who fails ends the comparison, unless `dropped` is given, which then hears of it while the
    others go on; ours is never dropped, nor who alone was to be compared with it. The weights'
    files are read before each load, so that all load from memory where that is large enough. Raises
    FastVLMError, one line, and leaves no process.
    """
    if not cases or plan.rounds < 1:
        raise FastVLMError("nothing is compared: give at least one case and one round")
    states = set()

    def ready() -> None:
        read_through(subject.files)
        states.add(file_cache_state(subject.files))

    with input_files(photo=plan.photo) as files:
        with ExitStack() as running:
            load = partial(_load, weights=subject.weights, files=files, plan=plan, ready=ready)
            runtimes = _started(contenders, load, running, say, dropped)
            turns = Turns.among(runtimes, cases, plan, say=say, dropped=dropped)
            turns.take()
        alive = [runtime.name for runtime in turns.runtimes]
        cold = start_in_turn(
            [contender for contender in contenders if contender.name in alive],
            subject.weights,
            plan.cold or cases[0],
            files,
            plan,
            ready=ready,
            say=say,
            dropped=dropped,
        )
        settings = Settings(
            runs=plan.rounds,
            warm_up_runs=plan.warm_up_runs,
            seed=subject.seed,
            file_cache=states.pop() if len(states) == 1 else "unknown",
            inputs=files.digests(cases),
        )
    ours, *others = [runtime for runtime in runtimes if turns.beyond[runtime.name][0]]
    reports = [
        dataclasses.replace(
            card(runtime, ours, subject, settings, command),
            cases=results(turns, runtime, subject.config),
            once=once(runtime, cold.get(runtime.name, {})),
        )
        for runtime in (ours, *others)
    ]
    agreement = {
        report.runtime: agreed(ours, runtime, turns)
        for report, runtime in zip(reports[1:], others, strict=True)
    }
    return Comparison(tuple(reports), agreement, interleaved=True, notes=turns.notes())


def _load(
    contender: Contender,
    *,
    weights: Weights,
    files: InputFiles,
    plan: Plan,
    ready: Callable[[], None],
) -> PeerRuntime:
    ready()
    return PeerRuntime(contender, weights, files, patience_s=plan.patience_s)


def _started(
    contenders: Sequence[Contender],
    load: Callable[[Contender], PeerRuntime],
    running: ExitStack,
    say: Say,
    dropped: Dropped | None,
) -> list[PeerRuntime]:
    """Start and load contenders, which `running` will end; `dropped` hears of those that fail."""
    runtimes: list[PeerRuntime] = []
    for place, contender in enumerate(contenders, 1):
        say(f"loading {contender.name}")
        try:
            runtime = load(contender)
        except FastVLMError as error:
            alone = place == len(contenders) and len(runtimes) == 1
            if dropped is None or not runtimes or alone:
                raise
            dropped(contender.name, error)
            continue
        running.callback(runtime.close)
        runtimes.append(runtime)
    return runtimes


def agreed(ours: PeerRuntime, theirs: PeerRuntime, turns: Turns) -> tuple[str, ...]:
    """Return lines, three a case: whether prompt, pixels and answer were the same in both."""
    lines = []
    for mine, other in zip(turns.tallies[ours.name], turns.tallies[theirs.name], strict=True):
        one, two = ours.shown[mine.case], theirs.shown[mine.case]
        pairs = enumerate(zip_longest(one["pixels"], two["pixels"]), 1)
        apart = ", ".join(str(number) for number, (a, b) in pairs if a != b)
        lines += [
            f"{mine.case.name}: {same}"
            for same in (
                same_ids("prompt", one["prompt_ids"], two["prompt_ids"]),
                f"other pixels in picture {apart}" if apart else "same pixels",
                same_ids("answer", mine.token_ids, other.token_ids),
            )
        ]
    return tuple(lines)


def same_ids(what: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Return a line that says that two lists of ids are equal, or where they part."""
    for place, (a, b) in enumerate(zip_longest(ours, theirs), 1):
        if a != b:
            one, two = (
                "none" if i is None else "a picture" if i == PICTURE_ID else str(i) for i in (a, b)
            )
            return f"{what} parts at id {place} of {len(ours)}: {one} in ours, {two} in theirs"
    return f"same {what}, {len(ours)} ids"


def compare_with_earlier(ours: Report, earlier: Report) -> Comparison:
    """Put an earlier result beside ours. Its ratios also have in them what changed meanwhile.

    Raises FastVLMError as `require_same_work` does, and if the two have no case in common.
    """
    require_same_work(ours, earlier)
    there = {result.case for result in earlier.cases}
    if not any(result.case in there for result in ours.cases):
        raise FastVLMError("the earlier result cannot be compared: it has none of these cases")
    return Comparison((ours, earlier), {}, interleaved=False)


def require_same_work(ours: Report, earlier: Report) -> None:
    """Raise FastVLMError, one line, unless both are of one model, dtype and inputs.

    A report without cases yet will do, so that this is known before anything is measured.
    """
    facts = {
        "model": (ours.model.name, earlier.model.name),
        "dtype": (ours.model.dtype, earlier.model.dtype),
        "quantization": (ours.model.quantization, earlier.model.quantization),
        "weights' fingerprint": (ours.model.fingerprint, earlier.model.fingerprint),
    }
    for name in ours.settings.inputs.keys() & earlier.settings.inputs.keys():
        facts[name] = (ours.settings.inputs[name], earlier.settings.inputs[name])
    for what, (one, two) in facts.items():
        if one != two:
            raise FastVLMError(
                f"the earlier result cannot be compared: its {what} is {two or 'unknown'}, "
                f"not {one or 'unknown'}"
            )


def ratios_json(ours: Report, theirs: Report, *, interleaved: bool) -> dict[str, Any]:
    """Return ours / theirs of every figure both have, by case's name; "once" is one of them."""

    def of(mine: dict[str, Series], other: dict[str, Series]) -> dict[str, Any]:
        pairs = {
            name: ratio(mine[name], other[name], interleaved=interleaved)
            for name in mine
            if name in other
        }
        return {name: dataclasses.asdict(found) for name, found in pairs.items() if found}

    cases = {result.case: result.series for result in theirs.cases}
    return {"once": of(ours.once, theirs.once)} | {
        result.case.name: of(result.series, cases[result.case])
        for result in ours.cases
        if result.case in cases
    }
