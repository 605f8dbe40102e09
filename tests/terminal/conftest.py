"""Chats in pseudo-terminals, and the models they talk with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.terminal.chat_models import scripted_model, slow_model
from tests.terminal.screen import Chat


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def chat(home: Path) -> Iterator[Callable[..., Chat]]:
    """Start `fastvlm chat`, on the demo model unless told otherwise."""
    with ExitStack() as stack:

        def start(*arguments: object, model: str | Path = "demo", **options: Any) -> Chat:
            if isinstance(model, Path):
                # Named from where it is: the names of temporary folders are long.
                options["cwd"], model = model.parent, f"./{model.name}"
            words = ("--model", model, *arguments)
            return stack.enter_context(Chat(*words, home=home, **options))

        yield start


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers as the demo model does; reads 2,500 positions in seconds."""
    return slow_model(tmp_path_factory.mktemp("slow") / "slow", layers=6, positions=4096)


@pytest.fixture(scope="session")
def tireless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers as the demo model does and goes on talking, what depends on the conversation."""
    folder = tmp_path_factory.mktemp("tireless") / "tireless"
    return slow_model(folder, layers=6, positions=4096, stops=False)


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers everything with "n000 n001 …" up to n299, again and again."""
    folder = tmp_path_factory.mktemp("counting") / "counting"
    return scripted_model(folder, [f"n{n:03d} " for n in range(300)], again=True, layers=4)
