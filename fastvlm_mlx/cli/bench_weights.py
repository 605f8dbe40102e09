"""The weights that `fastvlm bench` is about: found or made, loaded, and loaded by a fresh process.

Knows what the options say of a model and its loading. Measures nothing but how long that takes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx.bench.cold import ColdStart, cold_start
from fastvlm_mlx.bench.file_cache import file_cache_state, forget
from fastvlm_mlx.bench.results import Case, Report, Series
from fastvlm_mlx.bench.subject import Subject, stored_subject, synthetic_subject
from fastvlm_mlx.bench.synthetic import synthetic_checkpoint, synthetic_engine
from fastvlm_mlx.cli.asking import LOADING, load_engine
from fastvlm_mlx.cli.console import Console
from fastvlm_mlx.cli.countdown import Countdown
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.engine import Engine


@dataclass(frozen=True, slots=True)
class Wanted:
    """A command line: its options, as typed too, and the results it names, a report a model."""

    console: Console
    given: dict[str, Any]
    typed: str
    baseline: tuple[Report, ...] = ()
    earlier: tuple[Report, ...] = ()

    def with_(self, **changed: Any) -> Wanted:
        """Return the same with some options changed."""
        return dataclasses.replace(self, given=self.given | changed)


def config_of(wanted: Wanted) -> ModelConfig:
    """Return the model's sizes before it is loaded."""
    given = wanted.given
    if given["size"] is not None:
        return synthetic_checkpoint(given["size"], _bits(given), seed=seed_of(wanted)).config
    return _stored(wanted).config


def _stored(wanted: Wanted) -> Subject:
    chosen = {name: wanted.given[name] for name in ("dtype", "device", "vision_from")}
    wanted.console.start(f"Reading {wanted.given['model']}")
    return stored_subject(wanted.given["model"], **chosen, **callbacks(wanted.console))


@contextmanager
def subject_of(wanted: Wanted) -> Iterator[Subject]:
    """Give a folder that any runtime can load; random weights are written to a temporary one."""
    given = wanted.given
    if given["size"] is None:
        yield _stored(wanted)
        return
    wanted.console.start("Writing random weights")
    chosen = {name: given[name] for name in ("dtype", "device")}
    seed = seed_of(wanted)
    with synthetic_subject(given["size"], _bits(given), seed=seed, **chosen) as subject:
        yield subject


def start_cold(wanted: Wanted, case: Case) -> ColdStart | None:
    """Start fresh processes, if that was asked for."""
    given = wanted.given
    if given["cold"] is None:
        return None
    with subject_of(wanted) as subject:
        wanted.console.start("Starting cold")
        return cold_start(
            subject.weights.folder,
            case,
            runs=given["cold"],
            loading={name: given[name] for name in LOADING} | {"vision_from": subject.tower},
            photo=given["photo"],
            empty_file_cache=given["cold_files"],
            say=Countdown(wanted.console, given["cold"]),
        )


def loaded(wanted: Wanted) -> tuple[Engine, dict[str, Any], dict[str, Series]]:
    """Return the engine, what a report says of its weights, and how long loading took.

    Random weights are made, not loaded: for them there is no time.
    """
    given, console = wanted.given, wanted.console
    console.start("Loading")
    if given["size"] is not None:
        bits = _bits(given)
        names = (
            *("device", "dtype", "keep_quantized", "memory_limit"),
            *("low_memory", "paired_heads"),
        )
        chosen = {name: given[name] for name in names}
        engine = synthetic_engine(given["size"], bits, seed=seed_of(wanted), **chosen)
        return engine, {"synthetic": True, "quantization": str(bits)}, {}
    subject = _stored(wanted)
    if given["cold_files"]:
        forget(subject.files)  # the cold starts have read them
    state = file_cache_state(subject.files)
    since = time.perf_counter()
    engine = load_engine(given["model"], given, **callbacks(console))
    load_ms = (time.perf_counter() - since) * 1000
    about = {"synthetic": False, "quantization": subject.quantization, "file_cache": state}
    return engine, about, {"load_ms": Series("ms", (load_ms,))}


def seed_of(wanted: Wanted) -> int:
    """Return which random weights are made; 0 where none are."""
    return wanted.given["seed"] or 0


def _bits(given: dict[str, Any]) -> int:
    return int(given["bits"] or 16)


def callbacks(console: Console) -> dict[str, Any]:
    """Return what tells the user of reading a model, by the names `fastvlm_mlx.load` has."""
    return {
        "say": lambda line: console.line(f"fastvlm: {line}"),
        "progress": console.report,
    }
