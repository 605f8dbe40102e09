from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Ours and mlx-lm's own together: our decoder over its cache, and its sampler over our logits.
USE_BOTH = """
    import mlx.core as mx
    from tests.unit.tiny_decoder import GREEDY, PROMPTS, embed, make_decoder
    mx.disable_compile()
    decoder = make_decoder()
    import mlx_lm.models.cache, mlx_lm.models.qwen2, mlx_lm.sample_utils
    assert isinstance(decoder.qwen2, parts.Model)
    cache = mlx_lm.models.cache.make_prompt_cache(decoder.qwen2)
    hidden = decoder.hidden(embed(decoder, PROMPTS[0]), cache)
    sampler = mlx_lm.sample_utils.make_sampler(temp=0.0)
    assert sampler(decoder.logits(hidden)[:, -1]).item() == GREEDY[0]["ids"][0]
    assert mlx_lm.models.cache.trim_prompt_cache(cache, 2) == 2
    assert callable(mlx_lm.load) and callable(mlx_lm.stream_generate)
"""


def run(*scripts: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join(textwrap.dedent(script) for script in scripts)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def assert_runs(*scripts: str) -> None:
    done = run(*scripts)
    assert done.returncode == 0, done.stderr


def test_mlx_lm_is_used_without_its_package_init() -> None:
    """Its `__init__` imports transformers: 0.8 s of every cold start, 2.4 s beside torch."""
    assert_runs(
        """
        import sys
        from fastvlm_mlx.model import mlx_lm_parts as parts
        missing = [name for name in parts.__all__ if not hasattr(parts, name)]
        assert not missing, missing
        heavy = {"transformers", "torch", "tokenizers", "huggingface_hub"} & set(sys.modules)
        assert not heavy, heavy
        public = [name for name in sys.modules if name.split(".")[0] == "mlx_lm"]
        assert not public, public
        """
    )


def test_a_later_real_import_of_mlx_lm_is_whole() -> None:
    assert_runs("from fastvlm_mlx.model import mlx_lm_parts as parts", "import mlx_lm", USE_BOTH)


def test_an_earlier_real_import_of_mlx_lm_stays_whole() -> None:
    assert_runs(
        """
        import mlx_lm, sys
        before = {name: module for name, module in sys.modules.items() if "mlx_lm" in name}
        from fastvlm_mlx.model import mlx_lm_parts as parts
        assert all(sys.modules[name] is module for name, module in before.items())
        """,
        USE_BOTH,
    )


def test_an_unknown_layout_falls_back_to_the_plain_import() -> None:
    assert_runs(
        """
        import importlib.util, sys, tempfile
        from fastvlm_mlx.model import mlx_lm_parts as parts
        real = importlib.util.find_spec
        elsewhere = real("mlx_lm")
        elsewhere.submodule_search_locations = [tempfile.mkdtemp()]
        importlib.util.find_spec = lambda name: elsewhere if name == "mlx_lm" else real(name)
        modules = parts.load_modules("odd_layout")
        importlib.util.find_spec = real
        assert [m.__name__ for m in modules] == [f"mlx_lm.{name}" for name in parts._MODULES]
        assert not [name for name in sys.modules if name.startswith("odd_layout")]
        """
    )


def test_a_missing_mlx_lm_is_one_line_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(
        """
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "mlx_lm" else real(name)
        from fastvlm_mlx.errors import BackendError
        try:
            from fastvlm_mlx.model import mlx_lm_parts
        except BackendError as error:
            print(error)
        """
    )
    assert done.stdout.splitlines() == ["mlx-lm is not installed: pip install mlx-lm"]
