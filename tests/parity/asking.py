"""Asks a loaded engine what `demo.json` holds the answers to. Knows no folders and no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo_cases
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

import fastvlm_mlx as fv
from fastvlm_mlx.generate.loop import generate_ids
from fastvlm_mlx.prompt.processor import Prompt
from fastvlm_mlx.prompt.template import user_message
from fastvlm_mlx.sampling import GREEDY

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "fastvlm_mlx" / "demo"
REFERENCE: dict[str, Any] = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))
CASES: dict[str, Any] = REFERENCE["cases"]


def rendered(engine: fv.Engine, case: dict[str, Any]) -> Prompt:
    """Return the case's prompt by the engine's own processor."""
    message = user_message(case["question"], len(case["pictures"]))
    return engine.pipeline.processor.prompt([message])


def embeddings(engine: fv.Engine, case: dict[str, Any]) -> mx.array:
    """Return the prompt spliced with its pictures, [1, n, hidden]."""
    images = [engine.encode(demo_cases.picture(name)) for name in case["pictures"]]
    return engine.pipeline.embed(rendered(engine, case), images)


def greedy_ids(engine: fv.Engine, case: dict[str, Any]) -> list[int]:
    """Return 32 ids with nothing stopping them."""
    decoder = engine.pipeline.model.decoder
    steps = generate_ids(
        decoder,
        embeddings(engine, case),
        decoder.make_cache(),
        sampling=GREEDY,
        max_tokens=32,
        stop_ids=(),
    )
    return [step.token_id for step in steps]


def barred_ids(engine: fv.Engine, case: dict[str, Any]) -> list[int]:
    """Return 32 ids, none of the reference's stop ids: a loop of its own over decoder and cache."""
    decoder = engine.pipeline.model.decoder
    cache = decoder.make_cache()
    hidden = decoder.hidden(embeddings(engine, case), cache)
    ids: list[int] = []
    while True:
        logits = np.array(decoder.logits(hidden[:, -1:])[0, 0].astype(mx.float32))
        logits[REFERENCE["stop_ids"]] = -np.inf
        ids.append(int(logits.argmax()))
        if len(ids) == 32:
            return ids
        hidden = decoder.hidden(decoder.embed(mx.array([ids[-1:]])), cache)


def last_logits(engine: fv.Engine, case: dict[str, Any]) -> NDArray[np.float32]:
    """Return the logits [vocabulary] at the prompt's last position."""
    decoder = engine.pipeline.model.decoder
    hidden = decoder.hidden(embeddings(engine, case), decoder.make_cache())
    return np.array(decoder.logits(hidden[:, -1:])[0, 0].astype(mx.float32))


def relative_rms(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """Return the RMS of the difference, relative to the RMS of `theirs`."""
    assert ours.shape == theirs.shape
    return float(np.sqrt(np.mean((ours - theirs) ** 2.0) / np.mean(theirs**2.0)))
