"""`fastvlm bench`: how fast a model is here, in figures that others can repeat.

Every mistake that can be seen without measuring is found first: options, places to write, files to
read. Results are written at the end, whole. What is measured is `bench_runs.py`'s.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fastvlm_mlx.cli.artifacts import TYPED
from fastvlm_mlx.cli.asking import model_options
from fastvlm_mlx.cli.bench_options import MLX_VLM, bench_options, require_sense
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command

if TYPE_CHECKING:
    from fastvlm_mlx.bench.results import Report
    from fastvlm_mlx.cli.bench_runs import Measured


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
    stands the least time it could take on this machine. Let nothing else run meanwhile.
    """
    require_sense(context)
    made = _require_places(given)
    try:
        return _run(context, given)
    finally:
        if made:
            from fastvlm_mlx.bench.files import remove_if_empty

            remove_if_empty(given["plots"])


def _run(context: click.Context, given: dict[str, Any]) -> int:
    """Measure, write and print; return the exit code."""
    console: Console = context.obj
    from fastvlm_mlx.bench.files import read_reports
    from fastvlm_mlx.cli.bench_runs import measure
    from fastvlm_mlx.cli.bench_weights import Wanted

    baseline = () if given["check"] is None else read_reports(given["check"])
    earlier: tuple[Report, ...] = ()
    if given["compare"] not in (None, MLX_VLM):
        earlier = read_reports(given["compare"])
    measured = measure(
        Wanted(console, given, context.meta[TYPED], baseline=baseline, earlier=earlier)
    )
    console.close()
    _write(measured, given)
    if given["as_json"]:
        click.echo(json.dumps(measured.to_json(), allow_nan=False))
    else:
        _print(measured)
    return 0 if not baseline else _checked(console, measured.ours[0], baseline, given)


def _require_places(given: dict[str, Any]) -> bool:
    """Find out now, not after ten minutes of measuring, what cannot be written.

    Returns whether the folder for plots was made.
    """
    from fastvlm_mlx.bench import files

    if given["save"] is not None:
        files.require_place(given["save"], ".json")
    if given["csv"] is not None:
        files.require_place(given["csv"], ".csv")
    if given["plots"] is None:
        return False
    from fastvlm_mlx.bench.plots import require_matplotlib

    require_matplotlib()
    return files.require_folder(given["plots"])


def _write(measured: Measured, given: dict[str, Any]) -> None:
    from fastvlm_mlx.bench import files

    if given["save"] is not None:
        files.write_json(given["save"], measured.to_json())
    if given["csv"] is not None:
        from fastvlm_mlx.bench.spreadsheet import csv_rows

        rows = [row for report in measured.reports for row in csv_rows(report)]
        files.write_csv(given["csv"], rows)
    if given["plots"] is not None:
        from fastvlm_mlx.bench.plots import draw_all

        pictures = draw_all(*measured.reports, interleaved=measured.interleaved)
        files.write_pictures(given["plots"], pictures)


def _print(measured: Measured) -> None:
    """Print each model's table, what grew over the cases, and the ratios to other runtimes."""
    import textwrap

    from fastvlm_mlx.bench.ratios import WIDTH, comparison_table
    from fastvlm_mlx.bench.report import overview, table

    parts = [table(report) for report in measured.ours]
    if sum(len(report.cases) for report in measured.ours) > 1:
        parts.append("\n".join(overview(measured.ours)))
    if measured.comparison is not None:
        ours, *others = measured.comparison.reports
        for theirs in others:
            parts.append(comparison_table(ours, theirs, interleaved=measured.interleaved))
            parts.append("\n".join(measured.comparison.agreement.get(theirs.runtime, ())))
        notes = (textwrap.wrap(note, WIDTH) for note in measured.comparison.notes)
        parts.append("\n".join(line for lines in notes for line in lines))
    click.echo("\n\n".join(part for part in parts if part))


def _checked(
    console: Console, report: Report, baseline: tuple[Report, ...], given: dict[str, Any]
) -> int:
    """Say what got worse, a line each, and return the exit code."""
    from fastvlm_mlx.bench.baseline import TOLERANCE, check, choose

    tolerance = TOLERANCE if given["tolerance"] is None else given["tolerance"]
    found = check(report, choose(report, baseline), tolerance=tolerance)
    for name in found.missing:
        console.line(f"fastvlm: not checked: {name}")
    for regression in found.regressions:
        console.line(f"fastvlm: worse than the baseline: {regression}")
    if found.regressions:
        return 1
    console.line(f"fastvlm: no worse than the baseline in {found.compared} figures")
    return 0
