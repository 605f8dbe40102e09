"""The quality report: its divergence, what it counts, what it refuses to claim."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.convert.pipeline import convert
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.quantize.compare import KEPT, answer_all, coarsen, compare_all, divergence
from fastvlm_mlx.quantize.pictures import (
    DESCRIBE,
    Examined,
    Question,
    bundled_pictures,
    own_pictures,
)
from fastvlm_mlx.quantize.recipes import make_recipe
from fastvlm_mlx.quantize.report import Report, measure

pytestmark = pytest.mark.slow  # many small ones: together too long for `make check`

EXAMPLES = Path(__file__).parents[2] / "examples/images"
DEMO = Path(str(resources.files("fastvlm_mlx"))) / "demo"
FEW = bundled_pictures()[1:3]


def demo() -> Engine:
    return fv.load("demo")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its decoder at 2 bits: bad enough to be seen."""
    folder = tmp_path_factory.mktemp("report") / "packed"
    convert(
        "demo",
        folder,
        recipe=partial(make_recipe, "uniform", bits=2, group_size=32),
    )
    return folder


@pytest.fixture(scope="module")
def report(packed: Path) -> Report:
    return measure(demo, lambda: fv.load(packed), pictures=FEW)


def logprobs(seed: int, size: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=size) * 4
    return logits - np.log(np.exp(logits).sum())


def whole_divergence(first: np.ndarray, second: np.ndarray) -> float:
    return float((np.exp(first) * (first - second)).sum())


# Divergence


def test_the_divergence_of_small_vocabularies_is_the_whole_one() -> None:
    first, second = logprobs(1, 640), logprobs(2, 640)
    assert divergence(coarsen(first), second) == pytest.approx(
        whole_divergence(first, second), rel=1e-6
    )


def test_a_distribution_diverges_from_itself_by_nothing_at_all() -> None:
    for size in (640, 5000):
        row = logprobs(1, size)
        assert divergence(coarsen(row), row) == pytest.approx(0, abs=1e-12)


def test_tokens_that_are_not_kept_count_together() -> None:
    first, second = np.log([0.5, 0.3, 0.15, 0.05]), np.log([0.25, 0.25, 0.1, 0.4])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.3 * np.log(0.3 / 0.25) + 0.2 * np.log(0.2 / 0.5)
    assert divergence(coarsen(first, kept=2), second) == pytest.approx(expected, rel=1e-6)


def test_keeping_the_likeliest_never_overstates_and_hardly_understates() -> None:
    """A 152k vocabulary in float32 is 0.6 MB a position; what is kept is 16 kB."""
    for seed in range(3):
        first = logprobs(seed, 151_936)
        second = first + np.random.default_rng(seed + 10).normal(size=len(first)) * 0.05
        second -= np.log(np.exp(second).sum())
        outcomes = coarsen(first)
        whole = whole_divergence(first, second)
        assert 0.8 * whole < divergence(outcomes, second) < whole
        assert outcomes.ids.nbytes + outcomes.logprobs.nbytes == 8 * KEPT
        assert outcomes.likeliest == first.argmax()


def test_the_second_model_giving_the_rest_nothing_is_a_large_number_not_infinity() -> None:
    first = np.log([0.5, 0.3, 0.1, 0.1])
    with np.errstate(under="ignore"):
        second = np.array([np.log(0.5), np.log(0.5), -800.0, -800.0])
    assert np.isfinite(divergence(coarsen(first, kept=2), second))


# The engine's distributions


def test_distributions_say_of_each_token_what_score_says() -> None:
    engine = demo()
    image = engine.encode(EXAMPLES / "red_circle.png")
    ids = engine.pipeline.processor.tokenizer.encode("A red circle.")
    rows = np.concatenate(
        [np.array(block) for block in engine.distributions(DESCRIBE, [image], ids)]
    )
    assert rows.shape == (len(ids), engine.config.decoder.vocab_size)
    assert np.allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    scored = engine.score(DESCRIBE, [image], "A red circle.")
    assert np.array_equal(rows[np.arange(len(ids)), ids], np.array(scored, dtype=np.float32))


def test_no_tokens_have_no_distributions() -> None:
    with pytest.raises(PromptError, match="no tokens"):
        demo().distributions(DESCRIBE, [], [])


# The report


def test_a_model_against_itself_loses_nothing() -> None:
    same = measure(demo, demo, pictures=FEW)
    assert same.kl == type(same.kl)(mean=0, median=0, p99=0, max=0)
    assert same.top1_agreement == same.same_answers == 1
    assert same.unquantized.exact == same.quantized.exact
    assert same.unquantized.size == same.quantized.size


def test_positions_are_the_tokens_of_the_unquantized_model_s_answers(report: Report) -> None:
    """Both models are led along the same tokens: else a first difference would hide all others."""
    engine = demo()
    lengths = [
        len(engine.generate(question.text, images=[picture.source]).token_ids)
        for picture in FEW
        for question in picture.questions
    ]
    assert report.questions == len(lengths)
    assert report.positions == sum(lengths)


def test_two_bits_cost_something_and_it_is_seen(report: Report) -> None:
    assert 1e-4 < report.kl.mean < 10
    assert report.kl.median <= report.kl.p99 <= report.kl.max
    assert report.unquantized.exact == 1
    assert report.worst[0].kl == max(worst.kl for worst in report.worst)
    assert {worst.picture for worst in report.worst} == {picture.name for picture in FEW}


def test_sizes_are_those_of_the_files_and_bits_count_scales_too(
    report: Report, packed: Path
) -> None:
    for side, folder in ((report.unquantized, DEMO), (report.quantized, packed)):
        assert side.size.bytes == (folder / "model.safetensors").stat().st_size
    assert report.unquantized.size.bits_per_weight == 16
    shapes = [array.shape for array in _decoder_tensors()]
    matrices = sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)
    plain = sum(shape[0] for shape in shapes if len(shape) == 1)
    expected = (matrices * (2 + 2 * 16 / 32) + plain * 16) / (matrices + plain)
    assert report.quantized.size.decoder_bits_per_weight == pytest.approx(expected)
    assert report.quantized.size.decoder_bytes == pytest.approx(expected * (matrices + plain) / 8)
    assert report.quantized.packed == {"2 bits in groups of 32, affine": 22}


def _decoder_tensors() -> list[mx.array]:
    stored = mx.load(str(DEMO / "model.safetensors"))
    return [
        array
        for name, array in stored.items()  # type: ignore[union-attr]
        if name.startswith("model.language_model.")
    ]


def test_the_first_model_is_gone_before_the_second_is_loaded() -> None:
    """Two 7B models at once need twice the memory that either user or machine has."""
    models: list[weakref.ref] = []

    def load_and_watch() -> Engine:
        gc.collect()
        assert all(model() is None for model in models)
        engine = demo()
        models.append(weakref.ref(engine.pipeline.model))
        return engine

    measure(load_and_watch, load_and_watch, pictures=FEW[:1])
    assert len(models) == 2


def test_times_are_given_only_for_kernels_on_packed_weights(packed: Path, report: Report) -> None:
    """A CPU unpacks by default: the float model's times would pass for the quantized one's."""
    assert not report.quantized.kept_packed
    assert report.quantized.speed is None
    assert any("unpacked" in note for note in report.notes)
    kept = measure(
        demo, lambda: fv.load(packed, keep_quantized=True), pictures=FEW[:1], max_tokens=4
    )
    assert kept.quantized.kept_packed
    assert kept.quantized.speed is not None and kept.quantized.speed.prefill_ms is not None
    assert not kept.notes


def with_answers(change: Callable[[str], str | None]) -> tuple[Examined, ...]:
    return tuple(
        dataclasses.replace(
            picture,
            questions=tuple(
                Question(question.text, change(question.answer or ""))
                for question in picture.questions
            ),
        )
        for picture in FEW[:1]
    )


def test_accuracy_is_not_given_where_the_unquantized_model_has_none() -> None:
    """A set's exact wording says nothing about a model that was not made for it."""
    wrong = measure(demo, demo, pictures=with_answers(lambda text: f"It is {text}"))
    assert wrong.unquantized.exact is None and wrong.quantized.exact is None
    assert any("itself answers only 0%" in note for note in wrong.notes)
    none = measure(demo, demo, pictures=with_answers(lambda _: None))
    assert none.unquantized.exact is None
    assert any("no right answers" in note for note in none.notes)


def test_a_report_is_json_and_but_for_speed_and_device_the_same_again(
    report: Report, packed: Path
) -> None:
    again = measure(demo, lambda: fv.load(packed), pictures=FEW)

    def stable(made: Report) -> str:
        values = made.to_json()
        del values["device"], values["unquantized"]["speed"], values["quantized"]["speed"]
        return json.dumps(values, allow_nan=False)

    assert stable(report) == stable(again)
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    assert str(DEMO.parent) not in stable(report), "a machine's paths do not belong in an artifact"


def test_rows_leave_out_what_was_not_measured(report: Report) -> None:
    rows = {what: (before, after) for what, before, after in report.rows()}
    assert rows["bits a weight"][0] == "16.00"
    assert rows["exactly right"][0] == "100.0%"
    assert report.unquantized.speed is not None and "prefill" not in rows, "nothing to compare with"
    timed = dataclasses.replace(
        report, quantized=dataclasses.replace(report.quantized, speed=report.unquantized.speed)
    )
    assert {"prefill", "decode"} <= {row[0] for row in timed.rows()}
    silent = dataclasses.replace(
        report,
        unquantized=dataclasses.replace(report.unquantized, exact=None),
        quantized=dataclasses.replace(report.quantized, exact=None),
    )
    assert "exactly right" not in {row[0] for row in silent.rows()}


def test_progress_counts_the_questions_of_each_model() -> None:
    told: list[tuple[int, int, str]] = []
    measure(demo, demo, pictures=FEW[:1], progress=lambda *step: told.append(step))
    count = len(FEW[0].questions)
    assert [(done, total) for done, total, _ in told] == 2 * [(i + 1, count) for i in range(count)]


def test_no_pictures_are_refused() -> None:
    with pytest.raises(PromptError, match="at least one picture"):
        measure(demo, demo, pictures=())


def test_weights_that_are_not_numbers_stop_the_report() -> None:
    """A NaN in a sum of divergences would else make the whole report null."""
    engine = demo()
    answered = answer_all(engine, FEW[:1])
    weight = engine.pipeline.model.decoder.qwen2.model.norm.weight
    engine.pipeline.model.decoder.qwen2.model.norm.weight = weight * float("nan")
    with pytest.raises(FastVLMError, match="gives no numbers"):
        compare_all(engine, FEW[:1], answered)


# The pictures


def test_the_bundled_set_is_small_and_has_a_right_answer_to_everything() -> None:
    pictures = bundled_pictures()
    assert len(pictures) == 40
    assert sum(len(picture.questions) for picture in pictures) == 173
    assert all(question.answer for picture in pictures for question in picture.questions)
    folder = Path(str(resources.files("fastvlm_mlx.quantize"))) / "picture_set"
    assert {path.name for path in folder.iterdir()} == {p.name for p in pictures} | {"answers.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000


@pytest.mark.slow
def test_the_demo_model_knows_the_bundled_set_s_answers() -> None:
    """JPEG of the noisy pictures costs it nothing; so what is lost, quantizing lost."""
    answered = answer_all(demo(), bundled_pictures(), max_tokens=16)
    right = [question.answer for picture in bundled_pictures() for question in picture.questions]
    texts = [item.answer.text for item in answered]
    assert np.mean([text == answer for text, answer in zip(texts, right, strict=True)]) > 0.97


def test_own_pictures_are_asked_to_be_described() -> None:
    path = EXAMPLES / "red_circle.png"
    (picture,) = own_pictures([path])
    assert picture.questions == (Question(DESCRIBE),)
    made = measure(demo, demo, pictures=[picture])
    assert made.worst[0].unquantized == "A red circle."
    assert made.worst[0].picture == path.name
