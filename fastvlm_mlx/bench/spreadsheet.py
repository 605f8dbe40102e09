"""A report as tidy rows for a spreadsheet: a figure of a case each, with all that is known of it.

Knows the columns. Measures nothing; `files.py` writes them.
"""

from __future__ import annotations

from typing import Any

from fastvlm_mlx.bench.figures import metric_of, ordered
from fastvlm_mlx.bench.results import Report, Series

CSV_COLUMNS = (
    "runtime", "created", "chip", "gpu_cores", "device", "os", "power", "mlx", "backend",
    "model", "parameters", "dtype", "quantization", "fingerprint", "file_cache",
    "case", "resolution", "images", "prompt", "max_tokens",
    "prompt_tokens", "image_tokens", "generated_tokens",
    "metric", "unit", "better", "median", "p90", "n", "first_third", "last_third", "min", "max",
    "flops", "bytes", "limit_ms", "bound", "probe_ms",
)  # fmt: skip
"""What a row of `csv_rows` has, in order; the case's are empty for what is measured once."""


def csv_rows(report: Report) -> list[dict[str, Any]]:
    """Return a row for each case and figure, with every statistic; keys are CSV_COLUMNS.

    Times in milliseconds, speeds in tokens/s, memory in bytes. What is not known is "".
    """
    machine, model = report.machine, report.model
    whole = {
        "runtime": report.runtime,
        "created": report.created,
        **{name: getattr(machine, name) for name in ("chip", "gpu_cores", "device", "os", "power")},
        "mlx": machine.mlx,
        "backend": machine.backend,
        "model": model.name,
        **{name: getattr(model, name) for name in ("parameters", "dtype", "quantization")},
        "fingerprint": model.fingerprint,
        "file_cache": report.settings.file_cache,
    }
    rows = [whole | _csv_figure(name, report.once[name]) for name in ordered(report.once)]
    for result in report.cases:
        case = result.case
        about = {
            "case": case.name,
            **{name: getattr(case, name) for name in ("resolution", "images", "prompt")},
            "max_tokens": case.max_tokens,
            "prompt_tokens": result.prompt_tokens,
            "image_tokens": result.image_tokens,
            "generated_tokens": result.generated_tokens,
        }
        for name in ordered(result.series):
            values = whole | about | _csv_figure(name, result.series[name])
            limit = result.limits.get(name)
            if limit is not None:
                values |= {"flops": limit.flops, "bytes": limit.bytes}
                values |= {"limit_ms": limit.limit_ms, "bound": limit.bound}
                values["probe_ms"] = limit.probe_ms
            rows.append(values)
    return [{name: _cell(row.get(name)) for name in CSV_COLUMNS} for row in rows]


def _csv_figure(name: str, series: Series) -> dict[str, Any]:
    statistics = {key: value for key, value in series.to_json().items() if key != "values"}
    return statistics | {
        "metric": name,
        "better": metric_of(name, series).better,
        "min": min(series.values),
        "max": max(series.values),
    }


def _cell(value: Any) -> Any:
    return "" if value is None else value
