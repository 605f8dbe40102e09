"""mlx-vlm's own chat on the weights of a folder, turn by turn, with what its network is made to do.

Knows the class behind `python -m mlx_vlm.chat` and drives it as its loop does: a picture, then
questions. Nothing of it is changed but the dtype of its weights. Knows nothing of our chat;
`benchmarks/chat.py` has both.

    python -m benchmarks.peers.mlx_vlm_chat      seconds

asks a tiny random model of theirs about a picture that stays in its turn, as a caller may who
renders the prompt, and shows what its prefix reuse keeps of the cache. The last line is JSON.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import fastvlm_mlx  # noqa: F401  (OpenBLAS before mlx.core)

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_vlm import chat as their_chat
from mlx_vlm.models.fastvlm.language import LanguageModel
from mlx_vlm.models.fastvlm.vision import VisionModel

from benchmarks.peers.mlx_vlm_counts import IMAGE_TOKEN, small_model


@dataclass(slots=True)
class Turn:
    """Until the first token: positions prefilled, tower runs, processor and wall time."""

    prefilled: int = 0
    tower_runs: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    answer: str = ""


class MlxVlmChat:
    """A chat in float32. `decoder`, its weights by mlx-lm's names, is shared, to save 2 GB."""

    def __init__(self, folder: Path, *, max_tokens: int, decoder: dict[str, mx.array]) -> None:
        with redirect_stdout(StringIO()):
            self.chat = their_chat.MLXVisionChat(
                str(folder), temperature=0.0, max_tokens=max_tokens, verbose=False
            )
        model = self.chat.model
        _share(model.language_model, decoder)
        model.update(tree_map(_float32, model.parameters()))
        mx.eval(model.parameters())

    def begin(self) -> None:
        """Start a conversation that nothing is left of, as a new process would."""
        with redirect_stdout(StringIO()):
            self.chat.handle_command("/clear", "")
        self.chat.vision_cache.clear()
        self.chat.current_image = self.chat.current_image_path = None

    def ask(self, text: str, picture: Path | None = None) -> Turn:
        """Ask as its loop does; `picture` is given with /image before."""
        with redirect_stdout(StringIO()), _watched() as turn:
            if picture is not None:
                self.chat.handle_command("/image", str(picture))
            self.chat.add_to_history("user", text)
            turn.answer = self.chat.generate_response()
            self.chat.add_to_history("assistant", turn.answer)
        return turn


def _float32(array: mx.array) -> mx.array:
    return array if array.dtype == mx.float32 else array.astype(mx.float32)


def _share(theirs: Any, named: dict[str, mx.array]) -> None:
    """Put our float32 arrays in the place of their bfloat16 ones, if all of them are the same."""
    for name, array in tree_flatten(theirs.parameters()):
        if not mx.array_equal(array.astype(mx.float32), named[name]):
            raise SystemExit(f"{name} is not the same array in both")
    theirs.update(tree_unflatten(list(named.items())))


@contextmanager
def _watched() -> Iterator[Turn]:
    """Count and time what happens until the first token of one answer."""
    turn = Turn()
    answering = True
    real = LanguageModel.__call__, VisionModel.__call__, their_chat.stream_generate

    def language(self: Any, inputs: mx.array, *args: Any, **how: Any) -> Any:
        embeddings = how.get("inputs_embeds")
        if answering:
            turn.prefilled += (inputs if embeddings is None else embeddings).shape[1]
        return real[0](self, inputs, *args, **how)

    def vision(self: Any, *args: Any, **how: Any) -> Any:
        turn.tower_runs += 1
        return real[1](self, *args, **how)

    def stream(*args: Any, **how: Any) -> Iterator[Any]:
        nonlocal answering
        cpu, wall = time.process_time(), time.perf_counter()
        for chunk in real[2](*args, **how):
            if answering:
                turn.cpu_s, turn.wall_s = time.process_time() - cpu, time.perf_counter() - wall
                turn.prefilled -= 1  # the step that runs ahead of the first token
                answering = False
            yield chunk

    LanguageModel.__call__, VisionModel.__call__ = language, vision
    their_chat.stream_generate = stream
    try:
        yield turn
    finally:
        LanguageModel.__call__, VisionModel.__call__, their_chat.stream_generate = real


class _NoText:
    """A processor, tokenizer and detokenizer in one, for ids that mean nothing."""

    all_special_ids: tuple[int, ...] = ()
    last_segment = text = ""
    thinking_budget_criteria = None

    def __init__(self) -> None:
        self.tokenizer = self

    def stopping_criteria(self, _token: int) -> bool:
        """Never stop."""
        return False

    def add_token(self, token: int, **how: Any) -> None:
        """Take a token."""

    def finalize(self) -> None:
        """End the text."""


def picture_in_its_turn() -> dict[str, Any]:
    """Two turns by `stream_generate` with a PromptCacheState, the second also without: its answers.

    The picture is 4 positions and one id.
    """
    mx.random.seed(3)
    model = small_model()
    pixels = mx.random.uniform(shape=(1, 3, 128, 128))
    passes: list[tuple[int, int]] = []
    dispatch: Any = importlib.import_module("mlx_vlm.generate.dispatch")
    real = LanguageModel.__call__, dispatch.make_streaming_detokenizer

    def language(self: Any, inputs: mx.array, *args: Any, **how: Any) -> Any:
        embeddings = how.get("inputs_embeds")
        length = (inputs if embeddings is None else embeddings).shape[1]
        passes.append((int(how["cache"][0].offset), length))
        return real[0](self, inputs, *args, **how)

    def ask(ids: list[int], state: Any) -> tuple[list[int], int]:
        passes.clear()
        chunks = dispatch.stream_generate(
            model,
            _NoText(),
            "",
            input_ids=mx.array([ids]),
            pixel_values=pixels,
            max_tokens=6,
            temperature=0.0,
            prompt_cache_state=state,
        )
        tokens = [int(chunk.token) for chunk in chunks]
        return tokens[:6], passes[0][0]

    LanguageModel.__call__ = language
    dispatch.make_streaming_detokenizer = lambda processor: processor
    try:
        first = [*range(1, 15), IMAGE_TOKEN, *range(20, 32)]
        state = their_chat.PromptCacheState()
        answer, _ = ask(first, state)
        second = [*first, *answer, *range(40, 50)]
        warm, kept = ask(second, state)
        cold, _ = ask(second, their_chat.PromptCacheState())
    finally:
        LanguageModel.__call__, dispatch.make_streaming_detokenizer = real
    return {
        "ids_in_common": len(first) + len(answer),
        "positions_in_common": len(first) + 3 + len(answer),
        "positions_kept": kept,
        "warm": warm,
        "cold": cold,
    }


if __name__ == "__main__":
    print(json.dumps(picture_in_its_turn()))
