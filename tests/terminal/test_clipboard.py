"""The Mac's clipboard up to the edge of macOS: a program named osascript answers as the real one.

The answers' form is AppleScript's: `«data PNGf89504E47…»`, and error -1700 for what is not there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.terminal.clipboard import picture_in_clipboard, text_in_clipboard

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(path: Path, name: str, body: str) -> None:
    file = path / name
    file.write_text(f"#!{sys.executable}\nimport sys\nsaid = sys.stdout.write\n{body}\n", "utf-8")
    file.chmod(0o755)


def osascript(path: Path, answers: dict[str, str]) -> None:
    """Answer each expression that holds a key with its value, any other with error -1700."""
    program(
        path,
        "osascript",
        f"answers = {answers!r}\n"
        "assert sys.argv[1] == '-e'\n"
        "for part, answer in answers.items():\n"
        "    if part in sys.argv[2]:\n"
        "        sys.stdout.buffer.write((answer + '\\n').encode())\n"
        "        sys.exit(0)\n"
        "sys.exit('30:50: execution error: Can’t make data into the expected type. (-1700)')",
    )


def test_a_png_comes_back_byte_for_byte(path: Path) -> None:
    osascript(path, {"«class PNGf»": f"«data PNGf{PNG.hex().upper()}»"})
    assert picture_in_clipboard() == PNG


def test_a_tiff_is_taken_where_there_is_no_png(path: Path) -> None:
    osascript(path, {"«class TIFF»": "«data TIFF4D4D002A»"})
    assert picture_in_clipboard() == b"MM\0*"


def test_a_picture_copied_in_the_finder_is_its_file_not_its_icon(
    path: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "my photo.PNG"
    photo.write_bytes(PNG)
    osascript(path, {"«class furl»": str(photo)})
    assert picture_in_clipboard() == PNG
    osascript(path, {"«class furl»": str(tmp_path / "letter.txt")})
    assert picture_in_clipboard() is None
    osascript(path, {"«class furl»": str(tmp_path / "gone.png")})
    with pytest.raises(ImageError, match=r"gone\.png cannot be read: No such file"):
        picture_in_clipboard()


def test_a_clipboard_of_text_holds_no_picture(path: Path) -> None:
    osascript(path, {})
    assert picture_in_clipboard() is None


def test_other_failures_are_one_line(path: Path) -> None:
    program(path, "osascript", "sys.exit('execution error:\\nNot authorised. (-1743)')")
    with pytest.raises(
        ImageError, match=r"cannot be read: .*Not authorised\. \(-1743\)$"
    ) as raised:
        picture_in_clipboard()
    assert "\n" not in str(raised.value)
    program(path, "osascript", "said('«data PNGf895»')")
    with pytest.raises(ImageError, match="cut short"):
        picture_in_clipboard()


def test_elsewhere_it_says_to_give_a_file(path: Path) -> None:
    with pytest.raises(ImageError, match="on macOS only: give a file"):
        picture_in_clipboard()


def test_text(path: Path) -> None:
    assert text_in_clipboard() == ""
    program(path, "pbpaste", "sys.stdout.buffer.write('two\\nlínes'.encode())")
    assert text_in_clipboard() == "two\nlínes"
