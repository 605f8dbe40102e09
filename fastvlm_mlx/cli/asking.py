"""What `generate`, `chat`, `bench` share: options of a model and an answer, and what they mean.

Imports nothing heavy before a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastvlm_mlx.cli.options import Size, model_option, option
from fastvlm_mlx.sampling import Sampling

if TYPE_CHECKING:
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.engine import Engine

log = logging.getLogger("fastvlm_mlx")

_Function = TypeVar("_Function", bound=Callable[..., Any])

_MODEL = (
    option(
        "Model",
        "--vision-from",
        metavar="NAME|FOLDER",
        help="Where the vision tower is, for exports for Apple's app, which hold none.",
    ),
    option("Model", "--device", type=click.Choice(["cpu", "gpu"]), help="[default: MLX's choice]"),
    option(
        "Model",
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="What to compute in.  [default: bfloat16 on a GPU, float32 on a CPU]",
    ),
    option(
        "Model",
        "--memory-limit",
        type=Size(),
        help="Refuse a model that needs more memory than this, e.g. 8GB.",
    ),
    option(
        "Model",
        "--keep-quantized",
        is_flag=True,
        help="On a CPU, keep quantized weights packed: smaller and slower.",
    ),
    option(
        "Model",
        "--low-memory",
        is_flag=True,
        help="Run the vision tower step by step: the same answer, less memory for large pictures.",
    ),
    option(
        "Model",
        "--paired-heads",
        is_flag=True,
        help="Pair the tower's attention heads, for Metal's fused kernel; benchmarks/README.md.",
    ),
)
# The options of `load` that a command line may name.
LOADING = (
    *("dtype", "device", "memory_limit", "vision_from", "keep_quantized"),
    *("low_memory", "paired_heads"),
)
_ANSWER = (
    option(
        "Answer",
        "--max-tokens",
        metavar="N",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Longest answer.",
    ),
    option(
        "Answer",
        "--temperature",
        metavar="X",
        type=float,
        default=0.0,
        show_default=True,
        help="0 takes the likeliest token each time; higher is more varied.",
    ),
    option(
        "Answer",
        "--top-p",
        metavar="X",
        type=float,
        default=1.0,
        show_default=True,
        help="Keep the likeliest tokens that make up this probability; 1 is off.",
    ),
    option(
        "Answer",
        "--top-k",
        metavar="N",
        type=int,
        default=0,
        show_default=True,
        help="Keep this many of the likeliest tokens; 0 is off.",
    ),
    option(
        "Answer",
        "--min-p",
        metavar="X",
        type=float,
        default=0.0,
        show_default=True,
        help="Keep tokens at least this likely beside the likeliest; 0 is off.",
    ),
    option(
        "Answer",
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1 discourages repeating; 1 is off.",
    ),
    option(
        "Answer",
        "--seed",
        metavar="N",
        type=int,
        help="The same seed gives the same random answer.",
    ),
)


def model_options(function: _Function) -> _Function:
    """Add --model and how it is loaded; `load_engine` reads them."""
    return model_option(_with(_MODEL, function))


def answer_options(function: _Function) -> _Function:
    """Add --max-tokens and how tokens are chosen; `chosen_sampling` reads the latter."""
    return _with(_ANSWER, function)


def _with(options: tuple[Callable[[_Function], _Function], ...], function: _Function) -> _Function:
    for add in reversed(options):
        function = add(function)
    return function


def chosen_sampling(given: Mapping[str, Any]) -> Sampling:
    """Return the sampling of a command line; warn of options that do nothing."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: given[name] for name in names})
    if sampling.greedy and (given["top_p"], given["top_k"], given["min_p"]) != (1.0, 0, 0.0):
        log.warning("--top-p, --top-k and --min-p do nothing without --temperature")
    return sampling


def load_engine(
    model: str,
    given: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None],
    on_config: Callable[[ModelConfig], None] | None = None,
) -> Engine:
    """Load a model as a command line says. Raises a FastVLMError."""
    from fastvlm_mlx.engine import load

    options = {name: given[name] for name in LOADING}
    engine = load(model, say=say, progress=progress, on_config=on_config, **options)
    log.info(
        "%s: %s layout, computing in %s",
        engine.source,
        engine.layout,
        str(engine.dtype).removeprefix("mlx.core."),
    )
    return engine
