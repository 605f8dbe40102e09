"""Make tests/parity/beam.json: transformers' Qwen2 on frozen weights: logits, greedy, beams.

    pip install torch==2.15.0 transformers==5.23.0      # CPU; no GPU was used
    python tests/parity/make_beam_reference.py          # half a minute

A tiny Qwen2 in float64, so that the reference has no rounding of its own; generation itself sums
float32 log-probabilities, as transformers always does. Kept out of the file: anything near a tie.
Greedy choices must lead by MARGIN; beam results must survive NOISE on every log-probability.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import frozen
import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "hidden_size": 64,
    "num_layers": 3,
    "intermediate_size": 160,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 211,
}
PROMPT_LENGTHS = (7, 40)
GREEDY_TOKENS = 24
BEAM_TOKENS = 12
# Ours differs by about 1e-5 in float32.
MARGIN = 1e-2
NOISE = 1e-3
OUT = Path(__file__).with_name("beam.json")


def make_model(*, tied: bool) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        hidden_size=SIZES["hidden_size"],
        num_hidden_layers=SIZES["num_layers"],
        intermediate_size=SIZES["intermediate_size"],
        num_attention_heads=SIZES["num_heads"],
        num_key_value_heads=SIZES["num_kv_heads"],
        vocab_size=SIZES["vocab_size"],
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).double().eval()
    assert model.model.rotary_emb.inv_freq.shape == (8,)
    state = {
        key: torch.from_numpy(frozen.tensor(key, tuple(value.shape))).double()
        for key, value in model.state_dict().items()
    }
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


class Noise(LogitsProcessor):
    """Uniform noise on log-probabilities: a result that survives it does not hang on a near-tie."""

    def __init__(self, seed: int) -> None:
        self.stream = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        sample = torch.rand(scores.shape, generator=self.stream, dtype=scores.dtype)
        return scores + NOISE * (2 * sample - 1)


def continue_ids(model: Qwen2ForCausalLM, prompt: list[int], **options: Any) -> list[int]:
    """Return only the new ids of `model.generate`."""
    ids = torch.tensor([prompt])
    stop_ids = options.pop("stop_ids")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


def beam_case(
    model: Qwen2ForCausalLM, prompt_index: int, prompt: list[int], stop_ids: list[int],
    num_beams: int, length_penalty: float,
) -> dict[str, Any]:  # fmt: skip
    options: dict[str, Any] = {
        "stop_ids": stop_ids,
        "num_beams": num_beams,
        "max_new_tokens": BEAM_TOKENS,
        "length_penalty": length_penalty,
        "early_stopping": False,
    }
    ids = continue_ids(model, prompt, **options)
    for seed in range(4):
        noisy = LogitsProcessorList([Noise(seed)])
        again = continue_ids(model, prompt, **options, logits_processor=noisy)
        assert again == ids, f"near-tie: {prompt_index=} {num_beams=} {stop_ids=} {length_penalty=}"
    embeddings = model.model.embed_tokens(torch.tensor([prompt]))
    spliced = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
        **{k: v for k, v in options.items() if k != "stop_ids"},
    )
    assert spliced[0].tolist() == ids, "embeddings and ids disagree"
    return {
        "prompt": prompt_index,
        "num_beams": num_beams,
        "stop_ids": stop_ids,
        "length_penalty": length_penalty,
        "ids": ids,
    }


@torch.no_grad()
def prompt_logits(model: Qwen2ForCausalLM, prompt: list[int]) -> list[float]:
    return model(torch.tensor([prompt])).logits[0, -1].tolist()


@torch.no_grad()
def greedy_case(model: Qwen2ForCausalLM, prompt: list[int]) -> dict[str, Any]:
    """Greedy ids and their log-probabilities, by whole forward passes without a cache."""
    ids = list(prompt)
    for _ in range(GREEDY_TOKENS):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > MARGIN, f"near-tie after {len(ids)} ids"
        ids.append(int(best.indices[0]))
    new = ids[len(prompt) :]
    assert len(set(new)) >= GREEDY_TOKENS // 2, f"degenerate: {new}"
    logits = model(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :]
    logprobs = logits.log_softmax(-1)[torch.arange(GREEDY_TOKENS), new]
    return {"ids": new, "logprobs": logprobs.tolist()}


def main() -> None:
    stream = np.random.RandomState(13)
    prompts = [(stream.random_sample(n) * 211).astype(int).tolist() for n in PROMPT_LENGTHS]
    model = make_model(tied=False)
    beams = []
    for index, prompt in enumerate(prompts):
        for num_beams in (2, 3, 5):
            free = beam_case(model, index, prompt, [], num_beams, 1.0)
            beams.append(free)
            one, several = [free["ids"][5]], [free["ids"][9], free["ids"][3], 200]
            beams.append(beam_case(model, index, prompt, one, num_beams, 1.0))
            beams.append(beam_case(model, index, prompt, several, num_beams, 1.0))
            for penalty in (0.0, 2.0):
                beams.append(beam_case(model, index, prompt, several, num_beams, penalty))
    # Many stop ids: answers end at once, below rank k too, and the pool of finished ones overflows.
    for index, prompt in enumerate(prompts):
        for step in (4, 7, 12):
            stops = list(range(1, SIZES["vocab_size"], step))
            for penalty in (0.0, 1.0, 2.0):
                beams.append(beam_case(model, index, prompt, stops, 2, penalty))
    early = [c for c in beams if c["stop_ids"] and c["ids"][-1] in c["stop_ids"]]
    assert len(early) >= 6 and any(len(c["ids"]) < BEAM_TOKENS for c in early)
    assert any(c["stop_ids"] and len(c["ids"]) == BEAM_TOKENS for c in beams)
    reference = {
        "sizes": SIZES,
        "beam_tokens": BEAM_TOKENS,
        "prompts": prompts,
        "prompt_logits": {
            "untied": [prompt_logits(model, prompt) for prompt in prompts],
            "tied": [prompt_logits(make_model(tied=True), prompt) for prompt in prompts],
        },
        "greedy": [greedy_case(model, prompt) for prompt in prompts],
        "beams": beams,
    }
    OUT.write_text(json.dumps(reference, indent=None, separators=(",", ":")) + "\n")
    lengths = [len(c["ids"]) for c in beams]
    print(
        f"{OUT.name}: {len(beams)} beam searches, lengths {lengths}, {len(early)} ended by a stop"
    )


if __name__ == "__main__":
    main()
