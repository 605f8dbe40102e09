from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.generate.beam import beam_search
from fastvlm_mlx.model.decoder import Decoder
from tests.unit.tiny_decoder import PROMPTS, REFERENCE, embed, make_decoder

BEAMS: list[dict[str, Any]] = REFERENCE["beams"]
TOKENS: int = REFERENCE["beam_tokens"]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def search(decoder: Decoder, case: dict[str, Any], **options: Any) -> list[int]:
    options = {key: case[key] for key in ("num_beams", "stop_ids", "length_penalty")} | options
    prompt = embed(decoder, PROMPTS[case["prompt"]])
    return list(beam_search(decoder, prompt, max_tokens=TOKENS, **options))


def name_of(case: dict[str, Any]) -> str:
    stops = len(case["stop_ids"])
    return f"p{case['prompt']}-k{case['num_beams']}-stops{stops}-lp{case['length_penalty']:g}"


@pytest.mark.parametrize("case", BEAMS, ids=name_of)
def test_the_best_beam_is_that_of_transformers(decoder: Decoder, case: dict[str, Any]) -> None:
    assert search(decoder, case) == case["ids"]


def test_the_reference_tells_beams_stops_and_penalties_apart() -> None:
    """A reference that every setting satisfies would prove nothing."""
    by_setting = {name_of(case): tuple(case["ids"]) for case in BEAMS}
    assert by_setting["p0-k2-stops0-lp1"] != by_setting["p0-k3-stops0-lp1"]
    assert by_setting["p0-k3-stops3-lp1"] != by_setting["p0-k5-stops3-lp1"]
    assert by_setting["p0-k3-stops3-lp0"] != by_setting["p0-k3-stops3-lp1"]
    assert any(len(case["ids"]) < TOKENS for case in BEAMS)


def test_a_long_prompt_may_be_prefilled_in_chunks(decoder: Decoder) -> None:
    case = next(case for case in BEAMS if case["prompt"] == 1)
    assert search(decoder, case, prefill_step=16) == case["ids"]


def test_the_prompt_is_prefilled_once_and_each_step_runs_one_row_a_beam(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    hidden, logits = Decoder.hidden, Decoder.logits

    def note_hidden(self: Decoder, x: mx.array, cache: Any, **how: Any) -> mx.array:
        shapes.append(x.shape[:2])
        return hidden(self, x, cache, **how)

    def note_logits(self: Decoder, x: mx.array) -> mx.array:
        assert x.shape[1] == 1
        return logits(self, x)

    monkeypatch.setattr(Decoder, "hidden", note_hidden)
    monkeypatch.setattr(Decoder, "logits", note_logits)
    case = next(case for case in BEAMS if case["num_beams"] == 3 and not case["stop_ids"])
    search(decoder, case)
    assert shapes == [(1, len(PROMPTS[case["prompt"]]))] + [(3, 1)] * (TOKENS - 1)


def test_it_ends_once_no_running_beam_can_win(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    real = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, x: steps.append(1) or real(self, x))
    case = next(case for case in BEAMS if name_of(case) == "p0-k2-stops3-lp0")
    assert search(decoder, case) == case["ids"]
    assert len(case["ids"]) <= len(steps) < TOKENS


def test_impossible_requests_are_refused(decoder: Decoder) -> None:
    prompt = embed(decoder, PROMPTS[0])
    for beams in (1, 0, -1):
        with pytest.raises(FastVLMError, match=f"2 or more beams, not {beams}; 1 is greedy"):
            beam_search(decoder, prompt, num_beams=beams, max_tokens=4, stop_ids=())
    with pytest.raises(FastVLMError, match="max_tokens must be >= 1, not 0"):
        beam_search(decoder, prompt, num_beams=2, max_tokens=0, stop_ids=())
    with pytest.raises(PromptError, match="prompt is empty"):
        beam_search(decoder, prompt[:, :0], num_beams=2, max_tokens=4, stop_ids=())
    with pytest.raises(FastVLMError, match="3 beams are too many for 211 tokens; use fewer"):
        beam_search(decoder, prompt, num_beams=3, max_tokens=9, stop_ids=range(100))
