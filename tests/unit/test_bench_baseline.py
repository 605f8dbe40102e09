"""A baseline's check: what counts as worse, what may not be compared, what is named as missing."""

from __future__ import annotations

import dataclasses

import pytest
from bench_reports import made_case, made_machine, made_report

from fastvlm_mlx.bench.baseline import check, choose
from fastvlm_mlx.bench.results import Report, Series
from fastvlm_mlx.errors import FastVLMError


def worse_metrics(now: Report, before: Report, **tolerance: float) -> set[str]:
    return {one.metric for one in check(now, before, **tolerance).regressions}


def test_the_same_report_is_no_regression() -> None:
    found = check(made_report(), made_report())
    assert found.regressions == () and found.missing == ()
    assert found.compared == len(made_case().series)


def test_times_and_speeds_regress_in_opposite_directions() -> None:
    before, now = made_report(), made_report(made_case(factor=1.5))
    assert worse_metrics(now, before) == set(made_case().series) - {"peak_bytes", "prompt_ms"}
    assert worse_metrics(before, now) == set()


def test_within_the_tolerance_is_no_regression() -> None:
    before, now = made_report(), made_report(made_case(factor=1.15))
    assert worse_metrics(now, before, tolerance=0.2) == set()
    assert "ttft_ms" in worse_metrics(now, before, tolerance=0.1)


def test_what_is_within_the_baselines_noise_is_no_regression() -> None:
    """40 % worse than the median, but the baseline itself took as long in one run of ten."""
    noisy = made_report(made_case(series={"ttft_ms": (100.0,) * 8 + (150.0, 150.0)}))
    assert worse_metrics(made_report(made_case(series={"ttft_ms": (140.0,) * 3})), noisy) == set()
    assert worse_metrics(made_report(made_case(series={"ttft_ms": (151.0,) * 3})), noisy) == {
        "ttft_ms"
    }
    slow_once = made_report(made_case(series={"decode_tps": (50.0,) * 8 + (30.0, 30.0)}))
    assert (
        worse_metrics(made_report(made_case(series={"decode_tps": (35.0,) * 3})), slow_once)
        == set()
    )


def test_one_slow_run_of_a_few_is_no_regression() -> None:
    """With four runs the median is a mean of two: one hiccup must not make it much longer."""
    before = made_report(made_case(series={"prompt_ms": (3.1, 3.2, 3.2, 3.2)}))
    hiccup = made_report(made_case(series={"prompt_ms": (3.0, 3.2, 130.0, 130.0)}))
    assert worse_metrics(hiccup, before) == set()
    slower = made_report(made_case(series={"prompt_ms": (4.0, 4.0, 130.0, 130.0)}))
    assert worse_metrics(slower, before) == {"prompt_ms"}


def test_half_a_millisecond_is_no_regression() -> None:
    before = made_report(made_case(series={"prompt_ms": (0.3,) * 10}))
    for now, worse in ((0.79, set()), (0.81, {"prompt_ms"})):
        case = made_case(series={"prompt_ms": (now,) * 10})
        assert worse_metrics(made_report(case), before) == worse


@pytest.mark.parametrize("runs", [(1, 10), (10, 1), (2, 10)])
def test_a_time_of_too_few_measurements_is_named_and_not_judged(runs: tuple[int, int]) -> None:
    now, before = (
        made_report(once={"load_ms": Series("ms", (ms,) * n)})
        for ms, n in zip((900.0, 100.0), runs, strict=True)
    )
    found = check(now, before)
    assert found.regressions == ()
    assert found.missing == (
        "once a process: load (measured fewer than 3 times, so its noise is unknown)",
    )
    assert found.compared == len(made_case().series)


def test_of_a_sweeps_result_the_model_of_this_run_is_taken() -> None:
    sweep = [
        made_report(name=f"synthetic demo, {bits} bits", quantization=bits, fingerprint=f"f{bits}")
        for bits in ("16", "8", "4")
    ]
    assert choose(sweep[1], sweep) is sweep[1]
    unpacked = made_report(name="synthetic demo, 4 bits", quantization="4", unpacked=True)
    assert choose(unpacked, sweep) is sweep[2]
    with pytest.raises(FastVLMError, match="as stored there, unpacked here"):
        check(unpacked, choose(unpacked, sweep))
    with pytest.raises(FastVLMError, match=r"none of them 0\.5b: synthetic demo, 16 bits; "):
        choose(made_report(), sweep)


def test_memory_has_a_tolerance_of_its_own() -> None:
    now = made_report(made_case(series={"peak_bytes": (1.5e9 * 1.06,)}))
    assert worse_metrics(now, made_report(), tolerance=0.5) == {"peak_bytes"}
    assert worse_metrics(now, made_report(), memory_tolerance=0.1) == set()


def test_a_regression_is_one_line_with_both_medians() -> None:
    now = made_report(made_case(series={"ttft_ms": (188.1,) * 3}))
    (line,) = map(str, check(now, made_report()).regressions)
    assert line == (
        "512 px, 1 image, short prompt, 64 tokens: TTFT 188 ms, was 94.1 ms: 100% worse"
    )


def test_cases_and_figures_that_this_run_lacks_are_named() -> None:
    before = made_report(
        made_case(512), made_case(1024), once={"cold_ttft_ms": Series("ms", (900.0,))}
    )
    less = made_case(512)
    series = {name: one for name, one in less.series.items() if name != "vision_ms"}
    found = check(made_report(dataclasses.replace(less, series=series)), before)
    assert set(found.missing) == {
        "1024 px, 1 image, short prompt, 64 tokens (not measured now)",
        "512 px, 1 image, short prompt, 64 tokens: vision (not measured now)",
        "once a process (not measured now)",
    }


def test_what_reads_files_is_compared_only_in_the_same_state_of_the_file_cache() -> None:
    fast, slow = ({"load_ms": Series("ms", (ms,) * 3)} for ms in (100.0, 900.0))
    warm, cold = made_report(once=fast), made_report(once=slow, file_cache="cold")
    found = check(cold, warm)
    assert found.regressions == ()
    assert found.missing == ("once a process: load (the file cache was warm then, cold now)",)
    assert worse_metrics(made_report(once=slow), warm) == {"load_ms"}


def test_nothing_in_common_is_an_error_not_a_success() -> None:
    with pytest.raises(FastVLMError, match="no case in common"):
        check(made_report(made_case(512)), made_report(made_case(1024)))
    once = {"active_bytes": Series("bytes", (1e9,))}
    with pytest.raises(FastVLMError, match="no case in common"):
        check(made_report(made_case(512), once=once), made_report(made_case(1024), once=once))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (made_report(machine=made_machine(chip="Apple M8 Example")), "another chip"),
        (made_report(machine=made_machine(device="cpu")), "another device"),
        (made_report(machine=made_machine(gpu_cores=8)), "another number of GPU cores"),
        (made_report(parameters=1), "another number of parameters"),
        (made_report(quantization="4"), "another quantization"),
        (made_report(dtype="float16"), "another compute dtype"),
        (made_report(synthetic=False), "a real model's there, random, seed 0 here"),
        (made_report(settings={"seed": 7}), "random, seed 7 there, random, seed 0 here"),
        (made_report(settings={"low_memory": True}), "--low-memory there, plain here"),
        (made_report(settings={"paired_heads": True}), "--paired-heads there, plain here"),
        (made_report(fingerprint="f00"), "another model by its weights' fingerprint: f00 there"),
        (made_report(runtime="mlx-vlm 0.7.10"), "another runtime"),
        (made_report(inputs={"picture 512": "00"}), "another picture 512"),
        (
            made_report(dataclasses.replace(made_case(), prompt_tokens=91)),
            "the prompt is 90 tokens here and 91 in the baseline",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(other: Report, what: str) -> None:
    with pytest.raises(FastVLMError, match=what) as caught:
        check(made_report(), other)
    assert "\n" not in str(caught.value) and "--save" in str(caught.value)


def test_another_version_of_mlx_or_of_us_is_what_a_baseline_is_for() -> None:
    newer = made_report(runtime="fastvlm-mlx 0.2.0", machine=made_machine(mlx="0.33.0"))
    assert check(newer, made_report()).regressions == ()
