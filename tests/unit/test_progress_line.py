"""What a long task's line says: bytes done, bytes in all, the time left."""

from __future__ import annotations

from fastvlm_mlx.cli.console import progress_line


def test_time_left_is_reckoned_from_the_bytes_done_so_far() -> None:
    line = progress_line(2_000_000_000, 8_000_000_000, "Writing", 30.0)
    assert line == "Writing [#####---------------] 2 GB of 8 GB, 1 min 30 s left"


def test_no_time_is_promised_before_anything_is_known() -> None:
    assert progress_line(0, 10_000, "Writing", 5.0) == f"Writing [{'-' * 20}] 0 B of 10 kB"
    assert progress_line(10_000, 10_000, "Checking", 5.0).endswith("10 kB of 10 kB")


def test_without_a_total_only_the_task_is_named() -> None:
    assert progress_line(5, 0, "Downloading x", 5.0) == "Downloading x"
