from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.generate import samplers
from fastvlm_mlx.generate.samplers import Chooser, make_parts, normalise
from fastvlm_mlx.model.mlx_lm_parts import load_modules
from fastvlm_mlx.sampling import Sampling

VOCAB = 40
ROWS = 20_000
LOGITS = (np.random.RandomState(4).random_sample(VOCAB) * 6 - 3).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def oracle(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution after mlx-lm's top-p, min-p, top-k and temperature, in float64."""
    probabilities = np.exp(log_softmax(logits))
    order = np.argsort(-probabilities)
    keep = np.ones(len(logits), bool)
    above = np.cumsum(probabilities[order]) - probabilities[order]
    keep[order[above >= sampling.top_p]] = False
    keep &= probabilities >= sampling.min_p * probabilities.max()
    if 0 < sampling.top_k < len(logits):
        survivors = [i for i in order if keep[i]]
        keep[survivors[sampling.top_k :]] = False
    weights = np.where(keep, probabilities ** (1 / sampling.temperature), 0)
    return weights / weights.sum()


def draws(logits: np.ndarray, sampling: Sampling, rows: int = ROWS) -> np.ndarray:
    draw, _ = make_parts(sampling, len(logits))
    return np.array(draw(normalise(mx.array(np.tile(logits, (rows, 1))))))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 1.7},
        {"min_p": 0.2},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.8, "min_p": 0.1, "top_k": 6, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 1.0, "seed": 7, **options})
    expected = oracle(LOGITS, sampling)
    counts = np.bincount(draws(LOGITS, sampling), minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    deviation = np.abs(counts - ROWS * expected)
    assert (deviation <= 5 * np.sqrt(ROWS * expected) + 1).all()


def test_seeded_draws_are_those_of_mlx_lm_after_the_same_seed() -> None:
    logprobs = normalise(mx.array(LOGITS)[None])
    for top_p, min_p, top_k in itertools.product((1.0, 0.7), (0.0, 0.05), (0, 5)):
        sampling = Sampling(temperature=0.8, top_p=top_p, min_p=min_p, top_k=top_k, seed=11)
        draw, _ = make_parts(sampling, VOCAB)
        theirs = load_modules()[2].make_sampler(temp=0.8, top_p=top_p, min_p=min_p, top_k=top_k)
        ours = [draw(logprobs).item() for _ in range(12)]
        mx.random.seed(11)
        assert ours == [theirs(logprobs).item() for _ in range(12)]
        assert len(set(ours)) > 1


def test_a_seed_leaves_the_global_random_state_alone() -> None:
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    draws(LOGITS, Sampling(temperature=1.0, seed=3), rows=10)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_without_a_seed_draws_come_from_the_global_state() -> None:
    sampling = Sampling(temperature=1.0)
    mx.random.seed(1)
    first = draws(LOGITS, sampling, rows=50).tolist()
    assert draws(LOGITS, sampling, rows=50).tolist() != first
    mx.random.seed(1)
    assert draws(LOGITS, sampling, rows=50).tolist() == first


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 10**6])
def test_a_top_k_beyond_the_vocabulary_keeps_every_token(top_k: int) -> None:
    """mlx-lm raises a ValueError here."""
    everything = draws(LOGITS, Sampling(temperature=1.0, seed=2), rows=200)
    assert (
        draws(LOGITS, Sampling(temperature=1.0, top_k=top_k, seed=2), rows=200) == everything
    ).all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """1 / 5e-324 is infinite, and infinity times a log-probability of zero is no number."""
    drawn = draws(LOGITS, Sampling(temperature=temperature, seed=2), rows=20)
    assert set(drawn.tolist()) == {int(LOGITS.argmax())}


def test_greedy_normalises_nothing_unless_logprobs_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(samplers, "normalise", lambda x: calls.append(x.shape) or normalise(x))
    logits = mx.array(LOGITS)[None]
    token, logprob = Chooser(Sampling(), vocab_size=VOCAB)(logits)
    assert (token.item(), logprob, calls) == (int(LOGITS.argmax()), None, [])
    token, logprob = Chooser(Sampling(), vocab_size=VOCAB, logprobs=True)(logits)
    assert token.item() == int(LOGITS.argmax())
    assert logprob is not None and logprob.dtype == mx.float32
    assert logprob.item() == pytest.approx(log_softmax(LOGITS).max(), abs=1e-6)
    assert calls == [(1, VOCAB)]


def test_logprobs_are_of_the_model_before_filters_and_temperature() -> None:
    sampling = Sampling(temperature=3.0, top_k=2, seed=1)
    token, logprob = Chooser(sampling, vocab_size=VOCAB, logprobs=True)(mx.array(LOGITS)[None])
    assert logprob is not None
    assert logprob.item() == pytest.approx(log_softmax(LOGITS)[token.item()], abs=1e-5)


def test_logprobs_of_half_precision_logits_are_normalised_in_float32() -> None:
    logits = mx.array(LOGITS)[None].astype(mx.bfloat16)
    token, logprob = Chooser(Sampling(), vocab_size=VOCAB, logprobs=True)(logits)
    exact = log_softmax(np.array(logits.astype(mx.float32))[0])
    assert logprob is not None and logprob.dtype == mx.float32
    assert logprob.item() == pytest.approx(exact[token.item()], abs=1e-5)


@pytest.mark.parametrize("penalty", [1.5, 0.5])
def test_the_penalty_reaches_the_latest_prompt_and_answer_ids_only(penalty: float) -> None:
    """Positive logits are divided, negative ones multiplied, each id once however often it came."""
    context, prompt = 4, [0, 1, 2, 3, 3]
    sampling = Sampling(repetition_penalty=penalty, repetition_context=context)
    chooser = Chooser(sampling, vocab_size=VOCAB, prompt_ids=prompt, logprobs=True)
    history = list(prompt)
    for step in range(8):
        logits = np.roll(LOGITS, step)
        expected = logits.copy()
        for token in set(history[-context:]):
            expected[token] *= penalty if expected[token] < 0 else 1 / penalty
        token, logprob = chooser(mx.array(logits)[None])
        assert logprob is not None
        assert token.item() == int(expected.argmax())
        assert logprob.item() == pytest.approx(log_softmax(expected).max(), abs=1e-5)
        history.append(token.item())


def test_the_penalty_works_without_any_prompt_id() -> None:
    """The first choice has nothing to look back on; the second looks back on the first."""
    chooser = Chooser(Sampling(repetition_penalty=1e6), vocab_size=VOCAB)
    best = np.argsort(-LOGITS)[:2].tolist()
    assert [chooser(mx.array(LOGITS)[None])[0].item() for _ in range(2)] == best


def test_the_penalty_does_not_write_into_the_callers_logits() -> None:
    logits = mx.array(LOGITS)[None]
    sampling = Sampling(repetition_penalty=2.0)
    mx.eval(Chooser(sampling, vocab_size=VOCAB, prompt_ids=[1, 2])(logits)[0])
    assert (np.array(logits)[0] == LOGITS).all()


def test_no_option_starts_a_compiler_on_a_cpu(tmp_path: Path) -> None:
    """mlx-lm's filters are compiled functions: on a CPU, g++ for each unless that is off."""
    script = """
        import mlx.core as mx
        from fastvlm_mlx.backend import select_device
        from fastvlm_mlx.generate.samplers import Chooser
        from fastvlm_mlx.sampling import Sampling
        select_device("cpu")
        every = dict(temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, repetition_penalty=1.2)
        chooser = Chooser(Sampling(**every, seed=1), vocab_size=9, prompt_ids=[3], logprobs=True)
        print([chooser(mx.arange(9)[None] * 0.5)[0].item() for _ in range(4)])
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 4
    assert not list(tmp_path.rglob("*.so"))
