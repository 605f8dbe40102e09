"""The one table: ours, mlx-vlm and transformers+torch on the same work, taking turns on this CPU.

    python -m benchmarks.compare_all --mlx-vlm-python PYTHON --torch-python PYTHON

from the repository's root, where fastvlm-mlx is installed; PYTHON has mlx-vlm, the other one torch,
timm and transformers. About ten minutes for three rounds on two cores, and 11 GB of memory, as all
three stay loaded. Writes `results/peers.json` and `peers.md`, whole, also if one of the others
fails as long as there is something to compare with.

Random FastVLM-0.5B of real size, one picture, greedy, float32; each runtime has a process of its
own and waits while another computes; both MLX engines get the same OpenBLAS. A round is an answer
each, who begins rotates. Ratios are of a round's neighbours. Stages are of profiled calls, each
stage waited for, and add up to more than TTFT. The second turn is each one's own chat (mlx-vlm's
`MLXVisionChat`; transformers has none: the conversation is computed anew). Cold starts are fresh
processes at 256 px; their overhead is all until the call that answers but the weights, so that
neither disk, casting nor computing is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.comparison_table import markdown
from fastvlm_mlx.bench import files
from fastvlm_mlx.bench.compare import compare
from fastvlm_mlx.bench.peer_runtime import OURS, Contender, mlx_vlm
from fastvlm_mlx.bench.results import Case
from fastvlm_mlx.bench.subject import synthetic_subject
from fastvlm_mlx.bench.turns import Plan
from fastvlm_mlx.errors import FastVLMError

HERE = Path(__file__).parent
TORCH_PEER = HERE / "peers" / "transformers_torch.py"
COLD_SIDE = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mlx-vlm-python", type=Path, metavar="PATH")
    parser.add_argument("--torch-python", type=Path, metavar="PATH", help="left out: no torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profiled-rounds", type=int, default=1)
    parser.add_argument("--second-turns", type=int, default=1, help="rounds that ask again")
    parser.add_argument("--cold", type=int, default=3, help="fresh processes of each")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json")
    return parser.parse_args()


def teller() -> Callable[[str], None]:
    """Return what prints progress with the seconds since now."""
    since = time.monotonic()
    return lambda line: print(f"{time.monotonic() - since:6.0f} s  {line}", file=sys.stderr)


def main() -> int:
    options = arguments()
    try:
        compare_all(options)
    except FastVLMError as error:
        print(f"compare_all: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare_all(options: argparse.Namespace) -> None:
    """Measure, write both files, print the table. Raises FastVLMError, one line."""
    files.require_place(options.out, ".json")
    table = options.out.with_suffix(".md")
    if table == options.out:
        raise FastVLMError("--out is where the JSON goes: the table will stand beside it, as .md")
    files.require_place(table, ".md")
    say = teller()
    contenders = [OURS, mlx_vlm(options.mlx_vlm_python)]
    if options.torch_python is not None:
        contenders.append(Contender("transformers+torch", TORCH_PEER, options.torch_python))
    elif find_spec("torch") is not None:
        say("note: torch is installed beside ours, so mlx-vlm's imports may find it")
    failures: dict[str, str] = {}

    def dropped(name: str, error: FastVLMError) -> None:
        failures[name] = str(error)
        say(f"{name} is out: {error}")

    case = Case(
        resolution=options.resolution, images=1, prompt="short", max_tokens=options.max_tokens
    )
    say(f"writing random weights of size {options.size}")
    with synthetic_subject(options.size, 16, dtype="float32", device="cpu") as subject:
        found = compare(
            contenders,
            subject,
            [case],
            plan_of(options),
            command=f"python -m benchmarks.compare_all --rounds {options.rounds}",
            say=say,
            dropped=dropped,
        )
    results: dict[str, Any] = found.to_json() | {
        "failures": failures,
        "load_after": os.getloadavg()[0],
    }
    text = markdown(found, failures)
    files.write_json(options.out, results)
    files.write_whole(table, f"{text}\n".encode())
    print(text)
    print(json.dumps({name: medians(ratios) for name, ratios in results["ratios"].items()}))


def plan_of(options: argparse.Namespace) -> Plan:
    """Return how often what is done; warm-up and cold starts are of a small picture."""
    small = Case(resolution=COLD_SIDE, images=1, prompt="short", max_tokens=2)
    return Plan(
        rounds=options.rounds,
        warm_up=small,
        profiled_rounds=options.profiled_rounds,
        second_turns=options.second_turns,
        cold_runs=options.cold,
        cold=small,
    )


def medians(ratios: dict[str, Any]) -> dict[str, float]:
    """Return every figure's median ratio, of one case and of what is measured once."""
    return {
        name: round(found["median"], 4)
        for figures in ratios.values()
        for name, found in figures.items()
    }


if __name__ == "__main__":
    sys.exit(main())
