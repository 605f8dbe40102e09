"""`fastvlm bench`: how fast a model is here, in figures that others can repeat.

Every mistake that can be seen without measuring is found first: options, places to write, a
baseline of another machine. Files are written at the end, whole. Knows nothing of how anything is
measured.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from fastvlm_mlx.cli.artifacts import TYPED
from fastvlm_mlx.cli.asking import load_engine, model_options
from fastvlm_mlx.cli.bench_options import MLX_VLM, bench_options, require_sense
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command

if TYPE_CHECKING:
    from fastvlm_mlx.bench.results import Case, Report
    from fastvlm_mlx.engine import Engine

DEMO_NOTICE = (
    "fastvlm: measuring the demo model, which is tiny; for real sizes: --size 0.5b, or "
    "--model apple/FastVLM-0.5B"
)
_TOLERANCE = 0.1

log = logging.getLogger("fastvlm_mlx")


@click.command("bench", cls=Command, short_help="Measure how fast a model is here.")
@model_options
@bench_options
@click.pass_context
def command(context: click.Context, **given: Any) -> int:
    """Measure time to first token, its stages, decoding speed and memory.

    \b
    fastvlm bench --model apple/FastVLM-0.5B
    fastvlm bench --size 0.5b --bits 4 --sweep resolution --plots plots
    fastvlm bench --size 0.5b --save mine.json
    fastvlm bench --size 0.5b --check mine.json

    Pictures and prompts are pinned, answers are as long as --max-tokens says, and beside each stage
    stands the least time it could take on this machine. Nothing else should run meanwhile.
    """
    require_sense(context)
    _require_places(given)
    console: Console = context.obj
    from fastvlm_mlx.bench.files import read_report

    given["command"] = context.meta[TYPED]
    baseline = None if given["check"] is None else read_report(given["check"])
    earlier = None
    if given["compare"] not in (None, MLX_VLM):
        earlier = read_report(given["compare"])
    reports = list(_reports(console, given, baseline))
    console.close()
    _write(reports, earlier, given)
    _print(reports, earlier, given)
    return 0 if baseline is None else _checked(console, reports[0], baseline, given)


def _reports(console: Console, given: dict[str, Any], baseline: Report | None) -> Iterator[Report]:
    """Yield a report a model, each alone in memory: several only if their bits are varied."""
    if given["sweep"] != "quantization":
        yield _measured(console, given, baseline)
        return
    import gc

    import mlx.core as mx

    from fastvlm_mlx.bench.synthetic import BITS

    for bits in BITS:
        # Unpacked, as a CPU has them by default, all would be the same model.
        yield _measured(console, given | {"bits": bits, "keep_quantized": True}, None)
        gc.collect()
        mx.clear_cache()


def _require_places(given: dict[str, Any]) -> None:
    """Find out now, not after ten minutes of measuring, what cannot be written."""
    from fastvlm_mlx.bench import files

    if given["save"] is not None:
        files.require_place(given["save"], ".json")
    if given["csv"] is not None:
        files.require_place(given["csv"], ".csv")
    if given["plots"] is not None:
        from fastvlm_mlx.bench.plots import require_matplotlib

        require_matplotlib()
        files.require_folder(given["plots"])


def _measured(console: Console, given: dict[str, Any], baseline: Report | None) -> Report:
    """Load one model and measure it."""
    from fastvlm_mlx.bench.baseline import require_comparable
    from fastvlm_mlx.bench.results import Series
    from fastvlm_mlx.bench.run import describe, measure

    engine, about, load_ms = _loaded(console, given)
    cases = _cases(given, engine)
    console.start("Describing model and machine")
    report = describe(
        engine,
        cases,
        runs=given["runs"],
        warm_up_runs=given["warm_up"],
        seed=given["seed"],
        command=given["command"],
        photo=given["photo"],
        **about,
    )
    if baseline is not None:
        require_comparable(report, baseline)
    once = {} if load_ms is None else {"load_ms": Series("ms", (load_ms,))}
    console.start("Warming up")
    once["warm_up_ms"] = Series("ms", (engine.warm_up(),))
    report = dataclasses.replace(report, once=once)
    console.start("Measuring")
    say = _Countdown(console, (given["runs"] + given["warm_up"]) * len(cases))
    return measure(report, engine, cases, photo=given["photo"], say=say)


def _loaded(console: Console, given: dict[str, Any]) -> tuple[Engine, dict[str, Any], float | None]:
    """Return the engine, what a report says of its weights, and milliseconds it took to load.

    Random weights are made, not loaded: for them there is no time.
    """
    console.start("Loading")
    tower = {"paired_heads": given["paired_heads"], "low_memory": given["low_memory"]}
    if given["size"] is not None:
        from fastvlm_mlx.bench.synthetic import synthetic_engine

        bits = int(given["bits"] or 16)
        names = ("device", "dtype", "keep_quantized", "memory_limit", "seed")
        chosen = {name: given[name] for name in names}
        engine = synthetic_engine(given["size"], bits, **chosen, **tower)
        return engine, {"synthetic": True, "quantization": str(bits)}, None

    from fastvlm_mlx.bench.file_cache import file_cache_state
    from fastvlm_mlx.checkpoint.hub import model_folder

    model = given["model"]
    if model is None:
        console.line(DEMO_NOTICE)
        model = "demo"
    callbacks: dict[str, Any] = {
        "say": lambda line: console.line(f"fastvlm: {line}"),
        "progress": console.report,
    }
    folder = model_folder(model, **callbacks)
    state = file_cache_state(sorted(folder.glob("*.safetensors")))
    since = time.perf_counter()
    engine = load_engine(model, given, **callbacks, **tower)
    load_ms = (time.perf_counter() - since) * 1000
    quant = engine.config.quant
    packing = "16" if quant is None else f"{quant.bits} bits {quant.mode}"
    about = {"synthetic": False, "quantization": packing, "file_cache": state}
    return engine, about, load_ms


def _cases(given: dict[str, Any], engine: Engine) -> tuple[Case, ...]:
    """Return every combination of what was asked for, or the sweep's values where nothing was."""
    from fastvlm_mlx.bench import sweeps
    from fastvlm_mlx.bench.results import Case

    defaults: dict[str, tuple[Any, ...]] = {
        "resolution": (engine.config.vision.image_size,),
        "images": (1,),
        "prompt": ("short",),
    }
    if given["sweep"] in defaults:
        defaults[given["sweep"]] = {
            "resolution": sweeps.RESOLUTIONS,
            "images": sweeps.IMAGE_COUNTS,
            "prompt": tuple(f"{count} words" for count in sweeps.PROMPT_WORDS),
        }[given["sweep"]]
    chosen = [given[name] or default for name, default in defaults.items()]
    return tuple(
        Case(resolution=pixels, images=images, prompt=prompt, max_tokens=given["max_tokens"])
        for pixels, images, prompt in product(*chosen)
    )


class _Countdown:
    """Shows on the live line which run it is and about how long the rest will take."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._begun = -1
        self._since = time.monotonic()

    def __call__(self, line: str) -> None:
        """Begin the next measurement: `line` says which."""
        self._begun += 1
        log.info(line)
        run, colon, what = line.partition(": ")
        done, left = self._begun, self._total - self._begun
        if colon and done > 0:
            seconds = round((time.monotonic() - self._since) / done * left)
            run += f", about {readable_seconds(seconds)} left"
        self._console.report(0, 0, run + colon + what)


def readable_seconds(seconds: int) -> str:
    """Return a time as people say it: 40 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _json(reports: list[Report], earlier: Report | None) -> dict[str, Any]:
    """Return the first report's object, and whatever else was measured or compared within it."""
    values = reports[0].to_json()
    if len(reports) > 1:
        values["more"] = [report.to_json() for report in reports[1:]]
    if earlier is not None:
        values["compared_with"] = [earlier.to_json()]
    return values


def _write(reports: list[Report], earlier: Report | None, given: dict[str, Any]) -> None:
    from fastvlm_mlx.bench import files

    if given["save"] is not None:
        files.write_json(given["save"], _json(reports, earlier))
    if given["csv"] is not None:
        from fastvlm_mlx.bench.report import csv_rows

        files.write_csv(given["csv"], [row for report in reports for row in csv_rows(report)])
    if given["plots"] is not None:
        from fastvlm_mlx.bench.plots import draw_all

        others = reports[1:] if earlier is None else [earlier]
        files.write_pictures(given["plots"], draw_all(reports[0], *others))


def _print(reports: list[Report], earlier: Report | None, given: dict[str, Any]) -> None:
    if given["as_json"]:
        click.echo(json.dumps(_json(reports, earlier), allow_nan=False))
        return
    from fastvlm_mlx.bench.ratios import comparison_table
    from fastvlm_mlx.bench.report import overview, table

    click.echo("\n\n".join(table(report) for report in reports))
    if sum(len(report.cases) for report in reports) > 1:
        click.echo()
        click.echo("\n".join(overview(reports)))
    if earlier is not None:
        click.echo()
        click.echo(comparison_table(reports[0], earlier, interleaved=False))


def _checked(console: Console, report: Report, baseline: Report, given: dict[str, Any]) -> int:
    """Say what got worse, a line each, and return the exit code."""
    from fastvlm_mlx.bench.baseline import check

    tolerance = _TOLERANCE if given["tolerance"] is None else given["tolerance"]
    found = check(report, baseline, tolerance=tolerance)
    for name in found.missing:
        console.line(f"fastvlm: not checked: {name}")
    for regression in found.regressions:
        console.line(f"fastvlm: worse than the baseline: {regression}")
    if found.regressions:
        return 1
    console.line(f"fastvlm: no worse than the baseline in {found.compared} figures")
    return 0
