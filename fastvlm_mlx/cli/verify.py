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
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@option(
    "Consumer",
    "--for",
    "name",
    type=click.Choice(CONSUMERS),
    help="The program that is to load the folder.  [default: all its layout is meant for]",
)
@option("Output", "--all", "show_all", is_flag=True, help="Show requirements that are met, too.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(folder: Path, name: str | None, show_all: bool, as_json: bool) -> int:
    """Check a folder against every requirement of the programs that load it.

    \b
    fastvlm verify ./FastVLM-0.5B-4bit
    fastvlm verify ./model --for app --all

    Each requirement has the line of the program's source that it comes from. Only headers and
    JSON are read, no weights. Exits with 0 if all are met, 1 if one fails, 2 if the folder cannot
    be checked.
    """
    from fastvlm_mlx.convert.verify import consumers_of, only_sizes_differ, verify

    names = consumers_of(folder) if name is None else (name,)
    found = {each: verify(folder, each) for each in names}
    # Nobody asked of a small model that it be Apple's size, unless --for names who does.
    small = {each for each in names if name is None and only_sizes_differ(each, found[each])}
    if as_json:
        click.echo(json.dumps(_facts(folder, found), indent=2, ensure_ascii=False))
    else:
        for line in _lines(found, small, show_all=show_all):
            click.echo(line)
    judged = [finding for each in names if each not in small for finding in found[each]]
    return 0 if all(finding.passed for finding in judged) else 1


def _facts(folder: Path, found: dict[str, tuple[Finding, ...]]) -> dict[str, object]:
    """Return everything found, as JSON values."""
    from fastvlm_mlx.convert.verify import consumer

    return {
        "folder": str(folder),
        "consumers": {
            name: {
                "version": consumer(name).version,
                "passed": all(finding.passed for finding in findings),
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
