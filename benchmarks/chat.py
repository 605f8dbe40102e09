"""The second turn of a chat about one picture: warm beside cold, and beside mlx-vlm's own chat.

Run from the repository's root, the second where mlx-vlm is installed too:
    python -m benchmarks.chat --rounds 3
    python -m benchmarks.chat --rounds 3 --peer --json benchmarks/results/chat.json

Random FastVLM-0.5B at 1024 px in float32, greedy, one process. A round is a conversation each:
"What is this?" with a picture, then "Which colour is it?" without. Time is until the first token's
id. Cold is the same transcript with nothing kept: a call that encodes the picture and prefills
all; "features known" skips the tower, as for a picture of an earlier conversation. Positions are
counted inside the decoder, not believed. mlx-vlm's turns are its chat's, with the same BLAS, on
the same arrays. What all of a round do is compared by processor time: others use the machine.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastvlm_mlx as fv

# isort: split
import mlx.core as mx
from PIL import Image

from benchmarks import chat_weights
from fastvlm_mlx.events import ChatEvent
from fastvlm_mlx.generate.options import AnswerOptions, ImageOptions
from fastvlm_mlx.model.decoder import Decoder
from fastvlm_mlx.model.vision import FastViTHD

FIRST, SECOND = "What is this?", "Which colour is it?"
MAX_TOKENS = 8
Events = Iterable[ChatEvent]


@dataclass(slots=True)
class Turn:
    """Until the first token: positions prefilled, tower runs, processor and wall time."""

    prefilled: int = 0
    tower_runs: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    prompt: int = 0
    reused: int = 0
    ids: tuple[int, ...] = ()


@contextmanager
def watched(turn: Turn) -> Iterator[list[int]]:
    """Count the pictures given to the tower; yield the lengths of the decoder's passes."""
    passes: list[int] = []
    real_hidden, real_tower = Decoder.hidden, FastViTHD.__call__

    def hidden(self: Decoder, embeddings: mx.array, cache: Any, **how: Any) -> mx.array:
        passes.append(embeddings.shape[1])
        return real_hidden(self, embeddings, cache, **how)

    def tower(self: FastViTHD, pixels: mx.array) -> mx.array:
        turn.tower_runs += pixels.shape[0]
        return real_tower(self, pixels)

    Decoder.hidden, FastViTHD.__call__ = hidden, tower  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        Decoder.hidden, FastViTHD.__call__ = real_hidden, real_tower  # type: ignore[method-assign]


def answered(begin: Callable[[], Events]) -> Turn:
    """Read one answer, time it until its first token, and hold its stats against the counts."""
    turn = Turn()
    ids: list[int] = []
    with watched(turn) as passes:
        cpu, wall = time.process_time(), time.perf_counter()
        for event in begin():
            if isinstance(event, fv.TextDelta):
                if not ids:
                    turn.cpu_s = time.process_time() - cpu
                    turn.wall_s = time.perf_counter() - wall
                    # The last of them is the step that runs ahead of the first token.
                    turn.prefilled = sum(passes[:-1])
                ids += event.token_ids
            elif isinstance(event, fv.Finished):
                stats = event.stats
    turn.ids = tuple(ids)
    turn.prompt, turn.reused = stats.prompt_tokens, stats.reused_tokens
    assert turn.prefilled == turn.prompt - turn.reused
    assert turn.tower_runs == stats.encoded_images
    return turn


def cold(engine: fv.Engine, chat: fv.ChatSession, picture: Path) -> Turn:
    """Answer the conversation's last question from nothing but its transcript and picture."""

    def begin() -> Events:
        pipeline = engine.pipeline
        clock = pipeline.start_clock(profile=False)
        images = [pipeline.encode(picture, ImageOptions(), clock)]
        prompt = pipeline.processor.prompt(chat.messages[:-1])
        embeddings = pipeline.embed(prompt, images)
        cache = pipeline.model.decoder.make_cache()
        options = AnswerOptions(max_tokens=MAX_TOKENS)
        return pipeline.answer(embeddings, cache, prompt, options, clock)

    return answered(begin)


def ours(engine: fv.Engine, picture: Path) -> dict[str, Turn]:
    """Return each turn of a round, by name."""
    engine.image_features.clear()
    chat = engine.chat()
    turns = {
        "turn 1": answered(lambda: chat.stream(FIRST, [picture], max_tokens=MAX_TOKENS)),
        "turn 2": answered(lambda: chat.stream(SECOND, max_tokens=MAX_TOKENS)),
    }
    other = engine.chat()
    turns["turn 1, picture of an earlier conversation"] = answered(
        lambda: other.stream(FIRST, [picture], max_tokens=MAX_TOKENS)
    )
    turns["turn 2 cold, features known"] = cold(engine, chat, picture)
    engine.image_features.clear()
    turns["turn 2 cold"] = cold(engine, chat, picture)
    check(turns)
    return turns


def check(turns: dict[str, Turn]) -> None:
    """Hold what must be true of every round: only new positions, the tower once, equal answers."""
    first, second = turns["turn 1"], turns["turn 2"]
    # All of turn 1 but its last token, which was chosen and never read.
    assert second.reused == first.prompt + len(first.ids) - 1
    assert second.prefilled == second.prompt - second.reused
    assert (first.tower_runs, second.tower_runs) == (1, 0)
    assert turns["turn 1, picture of an earlier conversation"].tower_runs == 0
    for name in ("turn 2 cold", "turn 2 cold, features known"):
        assert turns[name].reused == 0
        assert turns[name].ids == second.ids
    assert turns["turn 2 cold"].tower_runs == 1


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return of each turn the counts, median times, and the median ratio to our cold turn 2."""
    result = {}
    for name in rounds[0]:
        turns = [turns[name] for turns in rounds]
        ratios = {
            f"{kind}_ratio": statistics.median(
                getattr(turns[name], kind) / getattr(turns["turn 2 cold"], kind) for turns in rounds
            )
            for kind in ("cpu_s", "wall_s")
        }
        times = {
            kind: statistics.median(getattr(turn, kind) for turn in turns)
            for kind in ("cpu_s", "wall_s")
        }
        assert len({(turn.prefilled, turn.tower_runs) for turn in turns}) == 1
        counts = {"prefilled": turns[0].prefilled, "tower_runs": turns[0].tower_runs}
        result[name] = counts | {k: round(v, 4) for k, v in (times | ratios).items()}
    return result


def table(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    lines = [
        "| | positions prefilled | tower runs | processor s | wall s | of our cold turn 2 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['prefilled']} | {row['tower_runs']} | {row['cpu_s']:.2f} "
            f"| {row['wall_s']:.2f} | {row['cpu_s_ratio']:.3f} |"
        )
    return "\n".join(lines)


def measure(folder: Path, rounds: int, *, peer: bool) -> list[dict[str, Any]]:
    """Take turns, alternating who begins, and return every round's turns by name."""
    picture = folder.parent / "picture.png"
    Image.fromarray(chat_weights.picture()).save(picture)
    engine = fv.load(folder)
    engine.warm_up()
    runs: list[Callable[[], dict[str, Any]]] = [lambda: ours(engine, picture)]
    if peer:
        from benchmarks.peers.mlx_vlm_chat import MlxVlmChat

        weights = engine.pipeline.model.decoder.source_weights()
        decoder = {name.removeprefix("qwen2."): array for name, array in weights.items()}
        theirs = MlxVlmChat(folder, max_tokens=MAX_TOKENS, decoder=decoder)

        def run() -> dict[str, Any]:
            theirs.begin()
            return {
                "mlx-vlm turn 1": theirs.ask(FIRST, picture),
                "mlx-vlm turn 2": theirs.ask(SECOND),
            }

        runs.append(run)
    found = []
    for number in range(rounds):
        turns: dict[str, Any] = {}
        for run in runs if number % 2 == 0 else reversed(runs):
            turns |= run()
        found.append(turns)
        done = ", ".join(f"{name} {turn.wall_s:.1f} s" for name, turn in turns.items())
        print(f"round {number + 1}: {done}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="mlx-vlm's chat as well")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastvlm-chat-") as temporary:
        folder = chat_weights.write_folder(Path(temporary) / "model")
        rounds = measure(folder, options.rounds, peer=options.peer)
    packages = ["mlx", "mlx-lm", *(["mlx-vlm"] if options.peer else [])]
    results = {
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "openblas_preloaded": "openblas" in loaded_libraries(),
        "turns": summary(rounds),
        "rounds": [{name: asdict(turn) for name, turn in turns.items()} for turns in rounds],
    }
    print(table(results["turns"]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


def loaded_libraries() -> str:
    """Return the paths of the libraries in this process; empty where /proc is not."""
    maps = Path("/proc/self/maps")
    return maps.read_text() if maps.exists() else ""


if __name__ == "__main__":
    main()
