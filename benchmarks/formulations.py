"""Which way of computing the model is fastest on this machine: the question only a device answers.

Run from the repository's root, on an idle machine, on its mains:
    python -m benchmarks.formulations                          0.5B at 1024 px
    python -m benchmarks.formulations --only "paired heads"    those with this in their name
    python -m benchmarks.formulations --size demo --resolution 256    a quick look
It takes minutes; how many depends on the device, --size, --resolution and --rounds.

Each comparison is the engine's form against another one, on the same weights (random, of the real
model's sizes) and the same input; their outputs must agree before a clock is started. They take
turns, each twice a round, in alternating order, and what counts is the ratio of a round's times.
How far ours is from itself is the noise. A form is called faster only if it was so in every round
and by more than the noise. On a GPU wall time is taken, on a CPU the processor's, which a neighbour
disturbs less. Where the engine has forms of its own for a CPU, the comparisons are between those of
a GPU all the same, and "as a GPU runs it" and low memory are against the CPU's. The last line is
JSON.

The answer says which switch to set (`paired_heads=True`), or that it takes a change of the code:
send the JSON to the project then.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
import mlx.core as mx

from benchmarks import decoder_variants, tower_variants
from benchmarks.arguments import Arguments, positive, side
from benchmarks.tower_variants import Step
from benchmarks.two_forms import LEAST_ROUNDS, Comparison, Result, compare
from fastvlm_mlx.backend import DTYPES, compute_dtype, has_scalar_cpu, select_device
from fastvlm_mlx.bench import inputs
from fastvlm_mlx.bench.synthetic import BITS, SIZES, synthetic_checkpoint
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.vision import AttentionBlock

# The largest relative RMS difference of two forms that are the same but for rounding.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 5e-2, mx.bfloat16: 5e-2}
PROMPT_POSITIONS = 286  # a picture of 1024 pixels and a short question
DECODE_STEPS = 16
CHANGE = "send the JSON to the project, it takes a change of fastvlm_mlx/model/"


def tower_comparisons(model: FastVLM, resolution: int) -> Iterator[Comparison]:
    """Yield those of the vision tower, whole and by its modules, each when its turn comes.

    The engine's form is its steps one after the other, as a GPU runs them.
    """
    tower, tolerance = model.vision, TOLERANCE[model.dtype]
    pixels = mx.array(inputs.pixels(resolution, resolution))[None]
    whole = tower_variants.reform(tower, {})

    def of_tower(name: str, other: Step, advice: str, within: float = tolerance) -> Comparison:
        return Comparison(name, lambda: whole(pixels), lambda: other(pixels), advice, within)

    def of_modules(name: str, pairs: list[tuple[Step, Step, mx.array]], advice: str) -> Comparison:
        return Comparison(
            name,
            lambda: tuple(step(x) for step, _, x in pairs),
            lambda: tuple(other(x) for _, other, x in pairs),
            advice,
            tolerance,
        )

    seen = tower_variants.first_inputs(tower, pixels)
    heads, steps = tower_variants.paired(tower), list(tower.steps())
    advice = "load(…, paired_heads=True)"
    yield of_tower("tower: paired heads", tower_variants.reform(heads, {}), advice)
    others = list(heads.steps())
    pairs = [(steps[i], others[i], x) for i, x in seen if isinstance(steps[i], AttentionBlock)]
    yield of_modules("attention: paired heads", pairs, f"{advice}, if the whole tower is too")
    del heads, others, pairs
    for name, (kind, form) in tower_variants.FORMS.items():
        pairs = [(steps[i], form(steps[i]), x) for i, x in seen if type(steps[i]) is kind]
        yield of_modules(name, pairs, f"{CHANGE}vision.py, {kind.__name__}")
    del seen
    if mx.default_device().type == mx.DeviceType.gpu:  # on a CPU the engine turns compiling off
        advice = f"{CHANGE}vision.py, FastViTHD"
        yield of_tower("tower: one mx.compile around it", mx.compile(whole), advice)
    if tower.form is not None:  # a CPU in float32: the engine goes another way
        advice = f"{CHANGE}fastvlm.py, use_cpu_forms"
        yield Comparison(
            "tower: as a GPU runs it",
            lambda: tower(pixels),
            lambda: whole(pixels),
            advice,
            tolerance,
        )
    low = tower_variants.step_by_step(tower)
    yield Comparison(
        "tower: low-memory mode",
        lambda: tower(pixels),
        lambda: low(pixels),
        "load(…, low_memory=True)",
        tolerance,
        "load(…, low_memory=True) where memory is short, else keep ours",
    )
    if model.dtype != mx.float32:
        name = "bfloat16" if model.dtype == mx.float16 else "float16"
        other = tower_variants.in_dtype(tower, getattr(mx, name))
        advice = f'load(…, dtype="{name}"), if answers stay as good'
        yield of_tower(f"tower: {name}", tower_variants.reform(other, {}), advice, 2 * tolerance)


def decoder_comparisons(model: FastVLM, bits: int) -> Iterator[Comparison]:
    """Yield those of the decoder: reading a prompt of usual length, and tokens after it.

    Ours is in the form that a GPU runs, on a CPU too: so the others are, which share its modules.
    """
    tolerance = TOLERANCE[model.dtype]
    ours = decoder_variants.as_a_gpu_runs_it(model.decoder)
    forms: dict[str, Callable[[], Any]] = {
        "as mlx-lm has it": lambda: decoder_variants.as_mlx_lm(ours, model.config),
        "RoPE of q and k apart": lambda: decoder_variants.turned_apart(ours),
    }
    for name, make in forms.items():
        both = (ours, make())
        prefill = [decoder_variants.prefilling(d, positions=PROMPT_POSITIONS) for d in both]
        decode = [
            decoder_variants.decoding(d, context=PROMPT_POSITIONS, steps=DECODE_STEPS) for d in both
        ]
        for stage, runs in (("prefill", prefill), ("decode", decode)):
            what = f"{stage}, {bits} bits: {name}"
            yield Comparison(what, *runs, f"{CHANGE}fused_qwen2.py", tolerance)
    if decoder_variants.has_cpu_forms(model.decoder):  # a CPU in float32, not packed
        runs = [
            decoder_variants.decoding(d, context=PROMPT_POSITIONS, steps=DECODE_STEPS)
            for d in (model.decoder, ours)
        ]
        what = f"decode, {bits} bits: as a GPU runs it"
        yield Comparison(what, *runs, f"{CHANGE}fastvlm.py, use_cpu_forms", tolerance)


def comparisons(
    size: str, *, resolution: int, dtype: mx.Dtype, bits: Sequence[int]
) -> Iterator[Comparison]:
    """Yield all of them: the tower's on the first of `bits`, the decoder's on each."""
    for index, kept in enumerate(bits):
        network = load_model(synthetic_checkpoint(size, kept), dtype, dequantize=False)
        if index == 0:
            yield from tower_comparisons(network, resolution)
        yield from decoder_comparisons(network, kept)


def names(*, on_cpu: bool, dtype: mx.Dtype, bits: Sequence[int]) -> list[str]:
    """Return the names of `comparisons`, in order, without a model."""
    cpu_forms = on_cpu and dtype == mx.float32 and has_scalar_cpu()
    found = ["tower: paired heads", "attention: paired heads", *tower_variants.FORMS]
    if not on_cpu:
        found.append("tower: one mx.compile around it")
    if cpu_forms:
        found.append("tower: as a GPU runs it")
    found.append("tower: low-memory mode")
    if dtype != mx.float32:
        found.append(f"tower: {'bfloat16' if dtype == mx.float16 else 'float16'}")
    for kept in bits:
        for form in ("as mlx-lm has it", "RoPE of q and k apart"):
            found += [f"{stage}, {kept} bits: {form}" for stage in ("prefill", "decode")]
        if cpu_forms and kept == 16:
            found.append(f"decode, {kept} bits: as a GPU runs it")
    return found


def row(result: Result) -> str:
    """One line of the table."""
    return (
        f"{result.name:38} {result.ratio:6.3f} ({result.lowest:.3f} to {result.highest:.3f}, "
        f"noise {result.noise:.3f})  peak {result.other_peak_mib:.0f} / {result.ours_peak_mib:.0f}"
        f" MiB  {result.verdict}"
    )


def machine(device: mx.Device) -> dict[str, Any]:
    """What the ratios depend on."""
    info = mx.device_info(device) if hasattr(mx, "device_info") else {}
    return {
        "processor": str(info.get("device_name") or platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "device": str(device),
        "mlx": version("mlx"),
    }


def parser() -> Arguments:
    """The options; values that cannot be measured are refused before anything is."""
    options = Arguments("benchmarks.formulations", __doc__)
    add = options.add_argument
    add("--size", choices=SIZES, default="0.5b", help="of the model; default: %(default)s")
    add("--resolution", type=side, default=1024, metavar="PIXELS",
        help="of the picture, a side, a multiple of 64; default: %(default)s")  # fmt: skip
    add("--bits", type=int, choices=BITS, nargs="+",
        help="of the decoder's weights; default: 16, on a GPU 16 and 4")  # fmt: skip
    add("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    add("--rounds", type=positive, default=7, metavar="N",
        help=f"a decision takes {LEAST_ROUNDS} or more; default: %(default)s")  # fmt: skip
    add("--only", default="", metavar="TEXT",
        help="comparisons with this in their name; default: all")  # fmt: skip
    return options


def conclusion(results: Sequence[Result], rounds: int) -> Iterator[str]:
    """Yield what to do."""
    faster = [result for result in results if result.verdict.startswith("faster")]
    for result in faster:
        yield f"{result.name} is {result.verdict}"
    if rounds < LEAST_ROUNDS:
        yield f"nothing decided: it takes {LEAST_ROUNDS} rounds or more"
    elif not faster:
        yield "nothing to change: no other form is faster here"


def main(arguments: list[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(arguments)
    try:
        device = select_device()
        dtype = compute_dtype(given.dtype, device)
    except FastVLMError as error:
        options.error(str(error))
    on_cpu = device.type == mx.DeviceType.cpu
    bits = list(dict.fromkeys(given.bits or ([16] if on_cpu else [16, 4])))
    known = names(on_cpu=on_cpu, dtype=dtype, bits=bits)
    if not any(given.only in name for name in known):
        options.error(f"no comparison has {given.only!r} in its name: {'; '.join(known)}")
    clock = time.process_time if on_cpu else time.perf_counter
    print("ratio of times, another form / ours: below 1 the other is faster")
    results = []
    for one in comparisons(given.size, resolution=given.resolution, dtype=dtype, bits=bits):
        if given.only in one.name:
            results.append(compare(one, rounds=given.rounds, clock=clock))
            print(row(results[-1]), flush=True)
    print("\n".join(conclusion(results, given.rounds)))
    report = {
        "size": given.size,
        "resolution": given.resolution,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "rounds": given.rounds,
        "clock": "processor" if on_cpu else "wall",
        "machine": machine(device),
        "comparisons": [asdict(result) for result in results],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
