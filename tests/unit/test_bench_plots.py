"""The benchmark's plots: PNGs of a known size, equal for equal reports, left out if empty."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_reports import VISION_LIMIT, made_case, made_report
from PIL import Image

from fastvlm_mlx.bench import plots
from fastvlm_mlx.bench.results import Report
from fastvlm_mlx.errors import FastVLMError

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

SWEEP = made_report(
    *(
        made_case(px, factor=(px / 512) ** 2, limits={"vision_ms": VISION_LIMIT})
        for px in (256, 512, 1024)
    )
)
PEER = made_report(*(made_case(px, factor=2.0) for px in (256, 512)), runtime="mlx-vlm 0.7.10")


def test_every_plot_is_a_png_of_eight_inches_width() -> None:
    drawn = plots.draw_all(SWEEP, PEER)
    assert list(drawn) == ["ttft-stages.png", "resolution.png", "comparison.png"]
    for raw in drawn.values():
        with Image.open(io.BytesIO(raw)) as image:
            assert image.format == "PNG"
            assert image.width == 8 * plots.DPI and 250 < image.height < 2500
            colours = image.convert("RGB").getcolors(1 << 20)
        assert colours is not None and len(colours) > 5, "an empty frame"


def test_the_same_report_is_the_same_bytes_without_a_date_or_version() -> None:
    first, second = plots.stage_bars(SWEEP), plots.stage_bars(SWEEP)
    assert first is not None and first == second
    assert b"tEXt" not in first and b"tIME" not in first


def test_the_colours_of_all_stages_are_in_the_stacked_bars() -> None:
    raw = plots.stage_bars(made_report(made_case(series={"prompt_ms": (5.0,)})))
    assert raw is not None
    with Image.open(io.BytesIO(raw)) as image:
        found = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    for colour in plots._COLOURS.values():
        assert tuple(bytes.fromhex(colour[1:])) in found


@pytest.mark.parametrize(
    ("report", "names"),
    [
        (made_report(made_case(512)), ["ttft-stages.png"]),
        (made_report(made_case(512), made_case(512, prompt="long")), ["ttft-stages.png"]),
        (made_report(made_case(512), made_case(256)), ["ttft-stages.png", "resolution.png"]),
    ],
)
def test_a_plot_without_its_figures_is_left_out(report: Report, names: list[str]) -> None:
    assert list(plots.draw_all(report)) == names


def test_models_of_one_runtime_are_named_by_model() -> None:
    """A sweep of bits: bars called after the runtime would all have one name."""
    ours, theirs = (made_report(name=name) for name in ("16 bits", "4 bits"))
    drawn = plots.comparison_bars(ours, theirs, interleaved=False)
    other = plots.comparison_bars(ours, made_report(name="8 bits"), interleaved=False)
    assert drawn is not None and drawn != other


def test_no_case_in_common_is_no_comparison() -> None:
    other = made_report(made_case(1536), runtime="mlx-vlm 0.7.10")
    assert plots.comparison_bars(made_report(), other, interleaved=True) is None


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FastVLMError, match=r"pip install 'fastvlm-mlx\[bench\]'") as caught:
        plots.stage_bars(SWEEP)
    assert "\n" not in str(caught.value)


def test_drawing_neither_reads_nor_changes_what_the_user_set() -> None:
    """A matplotlibrc with other sizes and a window's backend draws the same picture."""
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[2])\n"
        "import matplotlib\n"
        "def settings():\n"
        "    names = [name for name in matplotlib.rcParams if name != 'backend']\n"
        "    return {name: matplotlib.rcParams[name] for name in names}\n"
        "if sys.argv[1] == 'changed':\n"
        "    matplotlib.rcParams['font.size'] = 31; matplotlib.rcParams['backend'] = 'tkagg'\n"
        "before = settings()\n"
        "from test_bench_plots import SWEEP\n"
        "from fastvlm_mlx.bench import plots\n"
        "print(hashlib.sha256(plots.stage_bars(SWEEP)).hexdigest())\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    here = str(Path(__file__).parent)
    plain, changed = (
        subprocess.run(
            [sys.executable, "-c", code, how, here], capture_output=True, text=True, check=True
        ).stdout
        for how in ("plain", "changed")
    )
    assert plain == changed != ""


def test_a_legend_tells_runtimes_models_or_days_apart() -> None:
    ours = made_report()
    assert plots._sides([ours, made_report(runtime="mlx-vlm 1")]) == (ours.runtime, "mlx-vlm 1")
    assert plots._sides([made_report(name="a"), made_report(name="b")]) == ("a", "b")
    assert plots._sides([ours, made_report()]) == ("now", "saved")
