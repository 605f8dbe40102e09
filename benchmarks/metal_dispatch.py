"""The audit: which Metal kernels MLX would launch for our model, replayed without a GPU.

    python -m benchmarks.metal_dispatch                       0.5B in bfloat16 on a base chip
    python -m benchmarks.metal_dispatch --size 7b --bits 4 --chip m5-max --json out.json
    python -m benchmarks.metal_dispatch --check               limits hold, committed file is current
    python -m benchmarks.metal_dispatch --write               write the committed files anew

Counts launches, slow paths and bytes; says nothing of time. The rules and where each was read are
in `metal_rules`; mlx-vlm's counts by the same rules come from `peers/mlx_vlm_dispatch.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import metal_stages
from benchmarks.arguments import Arguments
from benchmarks.metal_rules import MLX_COMMIT, MLX_VERSION, SOURCES, check_version
from benchmarks.metal_rules.chips import CHIPS
from benchmarks.metal_rules.kernels import KINDS
from benchmarks.metal_summary import Summary, failures, of_chips, table
from fastvlm_mlx.bench.files import require_place
from fastvlm_mlx.errors import FastVLMError

RESULTS = Path(__file__).parent / "results"
OURS, PEER, TABLES = (
    RESULTS / name for name in ("metal-ours.json", "metal-mlx-vlm.json", "metal-audit.md")
)
SIZES, BITS = ("0.5b", "1.5b", "7b"), (16, 8, 4)
# A chip of each class whose rules differ for these graphs.
CLASSES = ("m1", "m1-max", "m1-ultra", "m4", "m4-max", "m5", "m5-max", "a19")
SHOWN = ("m1", "m1-max", "m5")
# Kernels without the second passes of products that a chip splits; decode is of 24 layers.
LIMITS = {"tower": 355, "tower, paired heads": 331} | {
    f"decode 0.5b {bits}-bit": 350 for bits in BITS
}
Stages = dict[str, dict[str, Summary]]


def ours(sizes: Sequence[str], bits: Sequence[int], chips: Sequence[str]) -> Stages:
    """Trace our stages and replay them on each chip; the tower is the same in every size."""
    stages = {name: of_chips([trace], chips) for name, trace in metal_stages.towers()}
    for size in sizes:
        for width in bits:
            for name, trace in metal_stages.language(size, width):
                stages[f"{name} {size} {width}-bit"] = of_chips([trace], chips)
    return stages


def report(stages: Stages, *, of: str, command: str) -> dict[str, Any]:
    """Return what a committed file holds."""
    return {
        "of": of,
        "command": command,
        "mlx": version("mlx"),
        "rules": {"version": MLX_VERSION, "commit": MLX_COMMIT, "sources": SOURCES},
        "activations": str(metal_stages.DTYPE).removeprefix("mlx.core."),
        "prompt_positions": metal_stages.PROMPT_POSITIONS,
        "decode_context": metal_stages.CONTEXT,
        "stages": stages,
    }


def spelled(found: Mapping[str, Any]) -> str:
    """Return a report as JSON, one line for each stage on each chip."""
    head = {key: value for key, value in found.items() if key != "stages"}
    stages = ",\n".join(
        f"  {json.dumps(stage)}: {{\n"
        + ",\n".join(f"   {json.dumps(c)}: {json.dumps(s)}" for c, s in chips.items())
        + "\n  }"
        for stage, chips in found["stages"].items()
    )
    return json.dumps(head, indent=1)[:-2] + ',\n "stages": {\n' + stages + "\n }\n}\n"


def stage_table(stages: Mapping[str, Mapping[str, Summary]], chip: str) -> str:
    """Return a table of kernels by stage and kind on one chip."""
    kinds = [k for k in KINDS if any(k in chips[chip]["kinds"] for chips in stages.values())]
    rows: list[list[object]] = [
        ["stage", "kernels", *kinds, "second passes", "slow paths", "elementwise MB"]
    ]
    for stage, chips in stages.items():
        summary = chips[chip]
        rows.append(
            [
                stage,
                summary["kernels"],
                *(summary["kinds"].get(kind, "") for kind in kinds),
                summary["second_passes"],
                sum(summary["slow"].values()),
                f"{summary['elementwise_bytes'] / 1e6:.1f}",
            ]
        )
    return table(rows)


def product_table(chips: Mapping[str, Summary], shown: Sequence[str]) -> str:
    """Return a table of a stage's products and the kernels they take, chip by chip."""
    sizes = dict.fromkeys(note for chip in shown for note, _, _ in chips[chip]["products"])
    rows: list[list[object]] = [["product", "times", *shown]]
    for size in sizes:
        found = [[p for p in chips[chip]["products"] if p[0] == size] for chip in shown]
        rows.append([size, found[0][0][2], *(" + ".join(p[1] for p in each) for each in found)])
    return table(rows)


def tables(own: Mapping[str, Any], peer: Mapping[str, Any]) -> str:
    """Return the committed tables: both runtimes side by side, then ours in full."""
    lines = [
        "# Metal kernels, replayed",
        "",
        f"Made by `{own['command']}` (mlx {own['mlx']}, rules of {MLX_VERSION} as read at the "
        f"commits in `metal_rules/__init__.py`); {peer['of']} by `{peer['command']}`. Activations "
        f"in {own['activations']}, 1024 px, a prompt of {own['prompt_positions']} positions, one "
        f"decode step at {own['decode_context']}. Launches, not times; no GPU was used. "
        "A second pass adds up a product that the chip's rule splits along K.",
        "",
        f"## Ours beside {peer['of']}",
        "",
        _beside(own["stages"], peer["stages"]),
    ]
    for chip in SHOWN:
        lines += ["", f"## Ours on {chip}", "", stage_table(own["stages"], chip)]
    for stage in ("tower", "prefill 0.5b 16-bit", "prefill 0.5b 4-bit", "decode 0.5b 4-bit"):
        lines += ["", f"## Products of {stage}", "", product_table(own["stages"][stage], SHOWN)]
    return "\n".join(lines) + "\n"


def _beside(own: Stages, peer: Stages) -> str:
    heads = [f"{chip}: {who}" for chip in SHOWN for who in ("ours", "theirs")]
    more = ["slow paths: ours", "theirs", "elementwise MB: ours", "theirs"]
    rows: list[list[object]] = [["stage, kernels on", *heads, *more]]
    for stage, chips in own.items():
        theirs = peer.get(stage)
        pair = (chips, theirs)
        first = SHOWN[0]
        cells: list[object] = [
            each[chip]["kernels"] if each else "" for chip in SHOWN for each in pair
        ]
        cells += [sum(each[first]["slow"].values()) if each else "" for each in pair]
        cells += [f"{each[first]['elementwise_bytes'] / 1e6:.1f}" if each else "" for each in pair]
        rows.append([stage, *cells])
    return table(rows)


def differences(found: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Say in which stages, on which chips, two reports differ, and in what."""
    new, old = found["stages"], stored["stages"]
    lines = []
    for stage in sorted({*new, *old}):
        for chip in sorted({*new.get(stage, {}), *old.get(stage, {})}):
            now, then = (each.get(stage, {}).get(chip, {}) for each in (new, old))
            what = sorted(key for key in {*now, *then} if now.get(key) != then.get(key))
            if what:
                lines.append(
                    f"{stage} on {chip}: {', '.join(what)} differ from the committed file "
                    f"({now.get('kernels')} kernels now, {then.get('kernels')} there)"
                )
    return lines


def all_of_ours() -> dict[str, Any]:
    """Return the report that is committed."""
    return report(
        ours(SIZES, BITS, CLASSES),
        of="fastvlm-mlx",
        command="python -m benchmarks.metal_dispatch --write",
    )


def parser() -> Arguments:
    """The options."""
    options = Arguments("benchmarks.metal_dispatch", __doc__)
    add = options.add_argument
    add("--size", choices=SIZES, default="0.5b", help="of the model; default: %(default)s")
    add("--bits", type=int, choices=BITS, default=16,
        help="of the decoder's weights; default: %(default)s")  # fmt: skip
    add("--chip", choices=sorted(CHIPS), default="m1", metavar="CHIP",
        help=f"one of {', '.join(sorted(CHIPS))}; default: %(default)s")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the report there as well")
    add("--check", action="store_true", help="exit with 1 if a limit is broken")
    add("--write", action="store_true", help="write the committed files anew")
    return options


def main(given: Sequence[str] | None = None) -> None:
    command = parser()
    arguments = command.parse_args(given)
    if arguments.json:
        try:
            require_place(arguments.json, ".json")
        except FastVLMError as error:
            command.error(str(error))
    check_version()
    if arguments.check or arguments.write:
        found = all_of_ours()
    else:
        stages = ours([arguments.size], [arguments.bits], [arguments.chip])
        found = report(
            stages, of="fastvlm-mlx", command=" ".join(sys.argv[1:] if given is None else given)
        )
        print(stage_table(stages, arguments.chip))
        for stage, chips in stages.items():
            print(f"\n{stage}\n{product_table(chips, [arguments.chip])}")
            print(f"copies: {chips[arguments.chip]['copies']}")
    if arguments.json:
        arguments.json.write_text(spelled(found))
    if arguments.write:
        OURS.write_text(spelled(found))
        TABLES.write_text(tables(found, json.loads(PEER.read_text())))
    wrong = failures(found["stages"], LIMITS)
    if arguments.check:
        wrong += differences(found, json.loads(OURS.read_text()))
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong and arguments.check else 0)


if __name__ == "__main__":
    main()
