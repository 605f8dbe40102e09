"""The benchmark's table and CSV: what stands where, what is flagged, what is unknown."""

from __future__ import annotations

import csv
import io
import re

from bench_reports import STAGE_MS, VISION_LIMIT, made_case, made_machine, made_report

from fastvlm_mlx.bench.figures import drift, shown, slow_tail
from fastvlm_mlx.bench.ratios import comparison_table, ratio, verdict
from fastvlm_mlx.bench.report import WIDTH, overview, table
from fastvlm_mlx.bench.results import METRICS, STAGES, Limit, Series
from fastvlm_mlx.bench.spreadsheet import CSV_COLUMNS, csv_rows


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]


def test_the_table_names_machine_model_runs_and_every_figure() -> None:
    text = table(made_report())
    for words in (
        "Apple M9 Example", "8 CPU cores", "10 GPU cores", "16 GB RAM", "macOS 26.2", "on battery",
        "MLX 0.32.4", "load 1.25", "random weights", "758.8 M parameters", "16 bits", "bfloat16",
        "fingerprint 01234567", "10 counted, 2 before them left out",
        "picture 512 a1b2c3d4", "prompt of 90 tokens, 64 of them the pictures'",
    ):  # fmt: skip
        assert words in text, words
    assert "a1b2c3d4a" not in text
    for name in made_case().series:
        assert METRICS[name].label in text


def test_the_head_says_which_form_the_tower_has_and_a_seed_of_random_weights_alone() -> None:
    (runs,) = lines_of(table(made_report()), "runs")
    assert runs.endswith(", file cache warm, seed 0")
    forms = {"low_memory": True, "paired_heads": True}
    text = table(made_report(settings=forms, synthetic=False))
    assert "tower in low memory, heads paired" in " ".join(text.split()) and "seed" not in text


def test_no_line_is_wider_than_a_terminal() -> None:
    limits = dict.fromkeys((*STAGES, "decode_tps"), VISION_LIMIT)
    cases = [made_case(px, images=3, limits=limits, factor=px / 4) for px in (256, 1536)]
    once = {"load_ms": Series("ms", (8e4,) * 9), "cold_ttft_ms": Series("ms", (9e4,))}
    ours = made_report(*cases, once=once)
    theirs = made_report(*cases, once=once, runtime="another 1.0", machine=made_machine(chip="X"))
    for text in (
        table(ours),
        comparison_table(ours, theirs, interleaved=True),
        comparison_table(ours, theirs, interleaved=False),
    ):
        assert max(map(len, text.splitlines())) <= WIDTH


def test_unknown_values_leave_no_gap() -> None:
    machine = made_machine(cpu_cores=None, gpu_cores=None, memory_bytes=None, power="")
    text = table(made_report(machine=machine))
    assert "None" not in text
    assert lines_of(text, "machine") == ["machine   Apple M9 Example, macOS 26.2"]


def test_a_stage_stands_beside_its_limit_and_whose_peak_that_is() -> None:
    case = made_case(runs=1, limits={"vision_ms": VISION_LIMIT})
    text = table(made_report(case))
    (vision,) = lines_of(text, "vision")
    assert " ".join(vision.split()) == "vision 60.0 ms 60% 120 GFLOP 400 MB 30.0 ms 50% of compute"
    (prefill,) = lines_of(text, "prefill")
    assert prefill.split() == ["prefill", "30.0", "ms", "30%"]
    (together,) = lines_of(text, "together")
    assert together.split()[1] == f"{sum(STAGE_MS.values()):.0f}"
    assert len(lines_of(text, "limit: Apple M9 Example: 4 TFLOPS")) == 1


def test_drifts_have_a_column_only_where_there_are_runs_enough() -> None:
    assert "first → last third" in table(made_report(made_case(runs=6)))
    assert "→" not in table(made_report(made_case(runs=5), once={"load_ms": Series("ms", (1.0,))}))


def test_the_limit_of_decoding_is_that_of_a_token() -> None:
    limit = Limit(flops=1e9, bytes=1e9, limit_ms=10.0, bound="memory")
    text = table(made_report(made_case(runs=1, limits={"decode_tps": limit})))
    (row,) = lines_of(text, "decode, a token")
    assert "20.0 ms" in row and row.endswith("50% of memory")


def test_what_is_done_sooner_than_its_limit_has_no_share_and_is_explained_once() -> None:
    """No program passes a machine's peak: a share above 100% says the peak is another one."""
    slow, fast = (Limit(flops=1e9, bytes=1e9, limit_ms=ms, bound="memory") for ms in (30.0, 31.0))
    limits = {"prefill_ms": slow, "vision_ms": fast, "decode_tps": fast}
    text = table(made_report(made_case(runs=1, limits=limits), made_case(256, limits=limits)))
    assert all(row.endswith("100% of memory") for row in lines_of(text, "prefill")[:1])
    assert lines_of(text, "decode, a token")[0].endswith("31.0 ms  above the peak")
    assert len(lines_of(text, "above the peak: done sooner")) == 1
    assert not [share for share in re.findall(r"(\d+)% of", text) if int(share) > 100]
    below = table(made_report(made_case(runs=1, limits={"prefill_ms": slow})))
    assert "above the peak" not in below


def test_a_limit_without_a_known_peak_shows_work_and_no_share() -> None:
    limit = Limit(flops=120e9, bytes=0.4e9)
    (row,) = lines_of(table(made_report(made_case(limits={"vision_ms": limit}))), "vision")
    assert row.endswith("120 GFLOP   400 MB")


def test_a_slower_end_is_flagged_for_times_and_speeds_but_not_for_few_runs() -> None:
    slowing, speeding = (90.0,) * 3 + (100.0,) * 3, (50.0,) * 3 + (40.0,) * 3
    text = table(made_report(made_case(series={"ttft_ms": slowing, "decode_tps": speeding})))
    (flag,) = lines_of(text, "(!)")
    assert "TTFT, decode" in flag and "Heat" in flag
    assert drift(Series("ms", slowing), "lower") == 100 / 90
    assert drift(Series("tokens/s", speeding), "higher") == 50 / 40
    assert drift(Series("ms", slowing[2:]), "lower") is None
    assert "(!)" not in table(made_report())


def test_the_slow_tail_of_a_speed_is_its_tenth_percentile() -> None:
    values = tuple(float(value) for value in range(1, 11))
    assert slow_tail(Series("ms", values), "lower") == 9
    assert slow_tail(Series("tokens/s", values), "higher") == 2


def test_figures_have_three_digits_and_their_unit() -> None:
    assert [shown(value, "ms") for value in (0.4213, 42.13, 421.3, 4213.0)] == [
        "0.42 ms", "42.1 ms", "421 ms", "4213 ms",
    ]  # fmt: skip
    assert shown(5.5, "tokens/s") == "5.50 tok/s"
    assert shown(1.52e9, "bytes") == "1.52 GB"


def test_an_overview_has_a_line_a_case_to_be_read_down() -> None:
    report = made_report(made_case(256), made_case(512, prompt="1024 words", factor=2.0))
    title, first, second = overview([report])
    assert first.split()[:3] == ["256", "1", "short"] and "94.1 ms" in first
    assert second.split()[:4] == ["512", "1", "1024", "words"] and "188 ms" in second
    assert len({len(line) for line in (title, first, second)}) == 1
    _, first, second = overview([made_report(), made_report(name="4 bits")])
    assert first.endswith("  0.5b") and second.endswith("  4 bits")


def test_a_row_of_csv_has_one_figure_with_all_that_is_known_of_it() -> None:
    once = {"load_ms": Series("ms", (800.0, 900.0))}
    case = made_case(limits={"vision_ms": VISION_LIMIT})
    rows = csv_rows(made_report(case, once=once))
    assert len(rows) == 1 + len(case.series)
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    read = {row["metric"]: row for row in csv.DictReader(io.StringIO(text.getvalue()))}
    vision = read["vision_ms"]
    assert vision["case"] == case.case.name and vision["chip"] == "Apple M9 Example"
    assert float(vision["median"]) == case.series["vision_ms"].median
    assert float(vision["limit_ms"]) == 30.0 and vision["bound"] == "compute"
    assert (float(vision["min"]), float(vision["max"])) == (60.0, 60.0 * 1.09)
    assert read["load_ms"]["case"] == "" and read["load_ms"]["n"] == "2"
    assert read["decode_tps"]["better"] == "higher" and read["decode_tps"]["limit_ms"] == ""


def test_a_ratio_of_interleaved_rounds_is_the_rounds_and_has_their_spread() -> None:
    ours, theirs = Series("ms", (1.0, 10.0, 3.0)), Series("ms", (2.0, 100.0, 4.0))
    found = ratio(ours, theirs, interleaved=True)
    assert found is not None
    assert (found.lowest, found.median, found.highest, found.rounds) == (0.1, 0.5, 0.75, 3)
    apart = ratio(ours, theirs, interleaved=False)
    assert apart is not None
    assert (apart.median, apart.lowest, apart.highest) == (3.0 / 4.0, None, None)
    assert ratio(ours, Series("ms", (0.0, 1.0, 1.0)), interleaved=True) is None


def test_a_word_is_said_only_where_every_round_agrees() -> None:
    theirs = Series("ms", (2.0, 3.0, 2.0))
    below = ratio(Series("ms", (1.0, 1.0, 1.0)), theirs, interleaved=True)
    mixed = ratio(Series("ms", (1.0, 4.0, 1.0)), theirs, interleaved=True)
    single = ratio(Series("ms", (1.0,)), Series("ms", (2.0,)), interleaved=True)
    assert below is not None and mixed is not None and single is not None
    assert verdict(single, "lower", "ms") == ""
    assert verdict(below, "lower", "ms") == "faster"
    assert verdict(below, "higher", "tokens/s") == "slower"
    assert verdict(below, "lower", "bytes") == "smaller"
    assert verdict(mixed, "lower", "ms") == ""


def test_a_comparison_says_what_was_not_the_same() -> None:
    ours = made_report(made_case(512), made_case(1024))
    theirs = made_report(
        made_case(512, factor=2.0),
        runtime="mlx-vlm 0.7.10",
        machine=made_machine(power="mains"),
        inputs={"picture 512": "00"},
        dtype="float16",
    )
    text = comparison_table(ours, theirs, interleaved=False)
    assert "not the same: power: on battery against mains" in text
    assert "not the same: compute dtype: bfloat16 against float16" in text
    assert "not the same: input picture 512" in text
    assert "saved has no such case" in text
    assert "now / saved" in text and "ours" not in text and "theirs" not in text
    beside = comparison_table(ours, theirs, interleaved=True)
    assert "ours / theirs" in beside and "saved" not in beside
    (ttft,) = lines_of(text, "TTFT  ")
    assert ttft.split() == ["TTFT", "94.1", "ms", "188", "ms", "0.50", "10"]


def test_the_file_caches_state_is_said_of_weights_that_were_read() -> None:
    assert "file cache cold" in table(made_report(synthetic=False, file_cache="cold"))
    assert "file cache" not in table(made_report(synthetic=True, file_cache="unknown"))


def test_the_parts_of_a_cold_start_stand_below_it() -> None:
    names = (
        *("cold_overhead_ms", "cold_start_ms", "cold_weights_ms", "active_bytes"),
        *("cold_ttft_ms", "load_ms"),
    )
    once = {name: Series("bytes" if "bytes" in name else "ms", (5.0,)) for name in names}
    lines = table(made_report(once=once)).splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("once a process"))
    assert [line.split("  5")[0].rstrip() for line in lines[first + 1 : first + 7]] == [
        "  load", "  cold TTFT", "    overhead", "      start", "    weights",
        "  MLX memory after loading",
    ]  # fmt: skip
