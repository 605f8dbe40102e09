"""`fastvlm inspect`: what a checkpoint holds, from its headers alone; no weights are read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastvlm_mlx.checkpoint.memory import readable_bytes
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.options import Command, option

if TYPE_CHECKING:
    from fastvlm_mlx.checkpoint.store import Checkpoint
    from fastvlm_mlx.prompt.tokenizer import Tokenizer

Facts = dict[str, Any]

_PARTS = ("vision", "projector", "decoder")


@click.command("inspect", cls=Command, short_help="Show what a model is.")
@click.argument("model", metavar="MODEL")
@option(
    "Model",
    "--vision-from",
    metavar="NAME|FOLDER",
    help="Where the vision tower is, for exports for Apple's app, which hold none.",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def command(console: Console, model: str, vision_from: str | None, as_json: bool) -> None:
    """Show a model's layout, sizes, dtypes, quantization and stop ids.

    \b
    fastvlm inspect demo
    fastvlm inspect ./llava-fastvithd_0.5b_stage3 --json

    MODEL is a folder, demo, or a hub name, which is downloaded first if it is not in the cache.
    Only headers are read, no weights.
    """
    console.start(f"Reading {model}")
    from fastvlm_mlx.checkpoint.store import open_checkpoint
    from fastvlm_mlx.prompt.tokenizer import Tokenizer

    tower = None if vision_from is None else _folder(vision_from, console)
    checkpoint = open_checkpoint(_folder(model, console), vision_from=tower)
    facts = _facts(checkpoint, Tokenizer.from_folder(checkpoint.folder))
    console.close()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for name, value in _rows(facts):
            click.echo(f"{name:<14}{value}".rstrip())


def _folder(model: str, console: Console) -> Path:
    from fastvlm_mlx.checkpoint.hub import model_folder

    say = lambda line: console.line(f"fastvlm: {line}")  # noqa: E731 (one expression)
    return model_folder(model, say=say, progress=console.report)


def _facts(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Facts:
    """Return everything shown, as JSON values; sizes in bytes, sides in pixels."""
    config = checkpoint.config
    side = config.vision.image_size
    stop_ids = sorted(tokenizer.stop_ids | set(config.eos_ids))
    return {
        "folder": str(checkpoint.folder),
        "layout": checkpoint.layout.name,
        "layout_description": checkpoint.layout.description,
        "tower_form": _tower_form(checkpoint),
        "config": config.to_json(),
        "image_size": side,
        "image_tokens": config.vision.tokens(side, side),
        "image_mode": config.image_mode,
        "context_positions": config.decoder.max_positions,
        "head": "tied" if config.decoder.tied else "stored",
        "stop_ids": {str(i): tokenizer.token(i) for i in stop_ids},
        "quantization": _quantization(checkpoint),
        "joined": _joined(checkpoint),
        "parts": {part: _part(checkpoint, part) for part in _PARTS},
        "stored_bytes": checkpoint.stored_bytes,
        "resident_bytes": _resident_bytes(checkpoint, dequantize=True),
        "resident_bytes_quantized": _resident_bytes(checkpoint, dequantize=False),
    }


def _tower_form(checkpoint: Checkpoint) -> str:
    """Whether the tower's branches are stored apart, as trained, or folded into one."""
    branched = any(
        name.startswith("vision.stem.") and ".kxk." in name for name in checkpoint.tensors
    )
    return "training" if branched else "fused"


def _part(checkpoint: Checkpoint, part: str) -> Facts:
    """Return a part's parameters as run, and what is stored of it, by dtype."""
    prefix = f"{part}."
    stored: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            dtype = tensor.stored.dtype
            stored[dtype] = stored.get(dtype, 0) + tensor.stored.nbytes
    shapes = [shape for name, shape in checkpoint.shapes.items() if name.startswith(prefix)]
    return {
        "parameters": sum(math.prod(shape) for shape in shapes),
        "stored_bytes": dict(sorted(stored.items(), key=lambda item: -item[1])),
    }


def _resident_bytes(checkpoint: Checkpoint, *, dequantize: bool) -> dict[str, int]:
    """Return bytes of the loaded weights by the dtype that is computed in."""
    import mlx.core as mx

    return {
        dtype: checkpoint.resident_bytes(getattr(mx, dtype), dequantize=dequantize)
        for dtype in ("float32", "bfloat16", "float16")
    }


def _quantization(checkpoint: Checkpoint) -> list[Facts]:
    """Return each setting with the modules of each part that have it, most modules first."""
    quant = checkpoint.config.quant
    if quant is None:
        return []
    settings: dict[tuple[int, int, str], dict[str, int]] = {}
    for path in checkpoint.quantized_paths:
        parts = settings.setdefault(quant.of(path), {})
        part = path.partition(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return [
        {"bits": bits, "group_size": group_size, "mode": mode, "modules": parts}
        for (bits, group_size, mode), parts in sorted(
            settings.items(), key=lambda item: -sum(item[1].values())
        )
    ]


def _joined(checkpoint: Checkpoint) -> Facts:
    """Return in how many of the layers each group of matrices runs as one, if kept quantized."""
    from fastvlm_mlx.model.fused_qwen2 import GROUPS

    quant, packed = checkpoint.config.quant, set(checkpoint.quantized_paths)
    layers = range(checkpoint.config.decoder.num_layers)
    joined = {"layers": len(layers)}
    for at, (name, parts) in GROUPS.items():
        groups = (
            [f"decoder.qwen2.model.layers.{layer}.{at}.{part}" for part in parts]
            for layer in layers
        )
        joined[name] = sum(
            len({quant.of(path) if quant and path in packed else None for path in paths}) == 1
            for paths in groups
        )
    return joined


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the lines people read, as (name, value)."""
    config = facts["config"]
    yield "folder", facts["folder"]
    yield "layout", f"{facts['layout']}: {facts['layout_description']}"
    yield (
        "pictures",
        (
            f"{facts['image_size']} pixels a side, {facts['image_tokens']} tokens, "
            f"{facts['image_mode']}"
        ),
    )
    yield "context", f"{facts['context_positions']} positions"
    stop_ids = (
        f"{number} {token or '(not in the vocabulary)'}"
        for number, token in facts["stop_ids"].items()
    )
    yield "stop ids", ", ".join(stop_ids)
    yield "", ""
    sizes = {
        "vision": _vision_sizes(config["vision"], facts["tower_form"]),
        "projector": _projector_sizes(config["projector"]),
        "decoder": _decoder_sizes(config["decoder"], facts["head"]),
    }
    for part, values in facts["parts"].items():
        yield (
            part,
            f"{_count(values['parameters'])} parameters, {_by_dtype(values['stored_bytes'])}",
        )
        for line in sizes[part]:
            yield "", line
    yield "", ""
    yield "quantization", "; ".join(map(_setting, facts["quantization"])) or "none"
    layers, qkv, gate_up = facts["joined"].values()
    if min(qkv, gate_up) < layers:
        yield (
            "joined",
            f"q/k/v in {qkv} of {layers} layers, gate/up in {gate_up} of {layers}, "
            "if kept quantized: the rest is packed differently",
        )
    yield "stored", readable_bytes(facts["stored_bytes"])
    yield "in memory", _by_dtype(facts["resident_bytes"])
    if facts["quantization"]:
        yield "", f"{_by_dtype(facts['resident_bytes_quantized'])}, kept quantized"


def _setting(setting: Facts) -> str:
    modules = ", ".join(f"{count} in {part}" for part, count in setting["modules"].items())
    return (
        f"{setting['bits']} bits, groups of {setting['group_size']}, {setting['mode']}: {modules}"
    )


def _vision_sizes(vision: Facts, form: str) -> Iterator[str]:
    yield f"stages of {_list(vision['layers'])} blocks, widths {_list(vision['embed_dims'])}"
    yield f"{2 * vision['embed_dims'][-1]} channels out, stored in {form} form"


def _projector_sizes(projector: Facts) -> Iterator[str]:
    yield f"{projector['kind']}, {projector['in_dim']} to {projector['out_dim']}"


def _decoder_sizes(decoder: Facts, head: str) -> Iterator[str]:
    yield (
        f"Qwen2, {decoder['num_layers']} layers, width {decoder['hidden_size']}, "
        f"{decoder['intermediate_size']} between, {decoder['num_heads']} heads, "
        f"{decoder['num_kv_heads']} for keys and values"
    )
    output = (
        "tied to the embedding"
        if head == "tied"
        else "stored (dropped at load if it equals the embedding)"
    )
    yield f"vocabulary {decoder['vocab_size']}, head {output}"


def _list(values: list[int]) -> str:
    return " ".join(map(str, values))


def _by_dtype(stored: dict[str, int]) -> str:
    return ", ".join(f"{readable_bytes(size)} {dtype}" for dtype, size in stored.items())


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.2f}{name}"
    return str(parameters)
