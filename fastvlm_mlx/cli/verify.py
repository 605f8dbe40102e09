"""`fastvlm verify`: does a folder hold what a program that loads it requires, line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastvlm_mlx.cli.options import Command, option

if TYPE_CHECKING:
    from fastvlm_mlx.convert.verify import Finding

# `convert.verify.CONSUMERS`, spelled out so that --help stays quick; a test compares them.
CONSUMERS = ("native", "mlx-vlm", "mlx-swift-lm", "app")


@click.command("verify", cls=Command, short_help="Check a folder against what loads it.")
@click.argument("name", metavar="DIR")
@option(
    "Consumer",
    "--for",
    "wanted",
    type=click.Choice(CONSUMERS),
    help="The program that is to load the folder; native is the folder as `fastvlm convert` writes "
    "it, complete for all.  [default: all its layout is meant for]",
)
@option("Output", "--all", "show_all", is_flag=True, help="Show requirements that are met, too.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(name: str, wanted: str | None, show_all: bool, as_json: bool) -> int:
    """Check a folder against every requirement of the programs that load it.

    \b
    fastvlm verify ./FastVLM-0.5B-4bit
    fastvlm verify ./model --for app --all

    DIR is a folder that `convert`, `quantize` or `export-app` wrote, or another's in the same form.
    Each requirement has the line of the program's source that it comes from. Only headers and JSON
    are read, no weights. mlx-vlm and the app have the sizes of Apple's tower in their code: a small
    model like the demo is held against those only if --for asks for it. Exits with 0 if all else is
    met, 1 if a requirement fails, 2 if the folder cannot be checked.
    """
    from fastvlm_mlx.checkpoint.hub import resolve
    from fastvlm_mlx.convert.verify import consumers_of, only_sizes_differ, verify

    folder = resolve(name, say=lambda line: click.echo(f"fastvlm: {line}", err=True))
    meant_for = consumers_of(folder)
    names = meant_for if wanted is None else (wanted,)
    found = {each: verify(folder, each) for each in names}
    # Nobody asked of a small model that it be Apple's size, unless --for names who does.
    small = {each for each in names if not wanted and only_sizes_differ(each, found[each])}
    if as_json:
        click.echo(json.dumps(_facts(folder, found, small), indent=2, ensure_ascii=False))
    else:
        for line in _lines(found, small, show_all=show_all):
            click.echo(line)
    judged = [finding for each in names if each not in small for finding in found[each]]
    return 0 if all(finding.passed for finding in judged) else 1


def _facts(
    folder: Path, found: dict[str, tuple[Finding, ...]], small: set[str]
) -> dict[str, object]:
    """Return everything found, as JSON values."""
    from fastvlm_mlx.convert.verify import consumer

    return {
        "folder": str(folder),
        "consumers": {
            name: {
                "version": consumer(name).version,
                "passed": all(finding.passed for finding in findings),
                "only_tower_sizes_differ": name in small,
                "requirements": [
                    {
                        "id": finding.requirement,
                        "says": finding.says,
                        "cite": finding.cite,
                        "passed": finding.passed,
                        "detail": finding.detail,
                    }
                    for finding in findings
                ],
            }
            for name, findings in found.items()
        },
    }


def _lines(
    found: dict[str, tuple[Finding, ...]], small: set[str], *, show_all: bool
) -> Iterator[str]:
    """Yield what people read: a line for each failure, and one for the consumer."""
    from fastvlm_mlx.convert.verify import consumer

    for name, findings in found.items():
        for finding in findings:
            if show_all or (finding.passed is False and name not in small):
                yield _line(name, finding)
        failed = sum(finding.passed is False for finding in findings)
        unchecked = sum(finding.passed is None for finding in findings)
        version = consumer(name).version
        if not failed:
            yield f"{name}: {len(findings)} requirements met ({version})"
        elif name in small:
            yield f"{name}: takes only towers of Apple's size; all else is met ({version})"
        else:
            rest = f", {unchecked} not checked for that" if unchecked else ""
            yield f"{name}: {failed} of {len(findings)} requirements failed{rest} ({version})"


def _line(name: str, finding: Finding) -> str:
    state = {True: "ok", False: "FAILED", None: "unchecked"}[finding.passed]
    detail = f"\n    {finding.detail}" if finding.detail else ""
    return f"{name}: {state}: {finding.requirement}: {finding.says} [{finding.cite}]{detail}"
