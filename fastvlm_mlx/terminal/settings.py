"""What a chat's user may set while it runs: the names, what each means, and values as typed.

Knows how a value is written ("0.7", "off") and where ranges are checked: in `Sampling`. Knows
nothing of sessions or terminals.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from fastvlm_mlx.generate.context import Overflow

_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class _Setting:
    """One name of /set: `read` takes a typed value, `words` stand for values that can be said."""

    name: str
    meaning: str
    expected: str
    read: Callable[[str], Any]
    words: dict[str, Any]


_SWITCH = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}


def _no_number(text: str) -> Any:
    raise ValueError(text)


_TABLE = (
    _Setting(
        "temperature",
        "0 takes the likeliest token each time; higher is more varied",
        "a number from 0, or off",
        float,
        {"off": 0.0, "none": 0.0},
    ),
    _Setting(
        "top_p",
        "keep the likeliest tokens that make up this probability",
        "a number up to 1, or off",
        float,
        {"off": 1.0, "none": 1.0},
    ),
    _Setting(
        "top_k",
        "keep this many of the likeliest tokens",
        "a whole number, or off",
        int,
        {"off": 0, "none": 0},
    ),
    _Setting(
        "min_p",
        "keep tokens at least this likely beside the likeliest",
        "a number from 0 to 1, or off",
        float,
        {"off": 0.0, "none": 0.0},
    ),
    _Setting(
        "repetition_penalty",
        "above 1 discourages repeating",
        "a number above 0, or off",
        float,
        {"off": 1.0, "none": 1.0},
    ),
    _Setting(
        "seed",
        "the same seed gives the same random answer",
        "a whole number, or off",
        int,
        {"off": None, "none": None, "random": None},
    ),
    _Setting("max_tokens", "longest answer, in tokens", "a whole number from 1", int, {}),
    _Setting(
        "overflow",
        "when the context is full: refuse the question, or drop the oldest turns",
        "refuse or drop",
        _no_number,
        {"refuse": "refuse", "drop": "drop"},
    ),
    _Setting("preview", "show each picture that is added", "on or off", _no_number, _SWITCH),
)
_BY_NAME = {setting.name: setting for setting in _TABLE}
SETTING_NAMES = tuple(_BY_NAME)
_OWN = ("max_tokens", "overflow", "preview")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How questions are answered from now on; the value `default` means this class's defaults.

    Raises PromptError for `max_tokens` below 1.
    """

    sampling: Sampling = GREEDY
    max_tokens: int = 256
    preview: bool = True
    overflow: Overflow = "refuse"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise PromptError(f"max_tokens must be >= 1, not {self.max_tokens}")

    def changed(self, name: str, value_text: str) -> Settings:
        """Return the settings with one changed; `name` may be cut short, or written `top-p`.

        Raises PromptError for a name there is none of and for a value that cannot be read,
        FastVLMError for one out of its range.
        """
        setting = find_setting(name)
        text = value_text.strip().lower()
        if text == _DEFAULT:
            value = Settings()._value(setting.name)
        elif text in setting.words:
            value = setting.words[text]
        else:
            try:
                value = setting.read(text)
            except ValueError:
                shown = value_text.strip()[:40] or "nothing"
                raise PromptError(
                    f"{setting.name} takes {setting.expected}, not {shown!r}"
                    if value_text.strip()
                    else f"{setting.name} takes {setting.expected}: /set {setting.name} VALUE"
                ) from None
        if setting.name in _OWN:
            return replace(self, **{setting.name: value})
        return replace(self, sampling=replace(self.sampling, **{setting.name: value}))

    def changed_all(self, assignments: str) -> Settings:
        """Return the settings after `name=value name=value …`, as /retry takes them.

        Raises as `changed` does, and PromptError for a word without `=`.
        """
        settings = self
        for word in assignments.split():
            name, equals, value = word.partition("=")
            if not equals:
                raise PromptError(
                    f"write name=value, as in temperature=0.7; {word[:40]!r} has no ="
                )
            settings = settings.changed(name, value)
        return settings

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, value as it is typed, meaning) for each setting, in /set's order."""
        return [(s.name, self._shown(s), s.meaning) for s in _TABLE]

    def row(self, name: str) -> tuple[str, str, str]:
        """Return the one setting's row; its meaning says also what it takes.

        Raises PromptError for a name there is none of.
        """
        setting = find_setting(name)
        return setting.name, self._shown(setting), f"{setting.meaning} (takes {setting.expected})"

    def _value(self, name: str) -> Any:
        return getattr(self if name in _OWN else self.sampling, name)

    def _shown(self, setting: _Setting) -> str:
        value = self._value(setting.name)
        if setting.name == "temperature":
            return f"{value:g}"
        # The first word that means this value: "off" rather than top_p's 1.
        for word, meant in setting.words.items():
            if meant == value and (meant is not None or value is None):
                return word
        return f"{value:g}" if isinstance(value, float) else str(value)


def find_setting(name: str) -> _Setting:
    """Return the setting of that name, or the only one that starts so.

    Raises PromptError naming what was probably meant.
    """
    wanted = name.strip().lower().replace("-", "_")
    if wanted in _BY_NAME:
        return _BY_NAME[wanted]
    starting = [known for known in SETTING_NAMES if wanted and known.startswith(wanted)]
    if len(starting) == 1:
        return _BY_NAME[starting[0]]
    if starting:
        raise PromptError(f"{wanted[:40]} may be {' or '.join(starting)}: write more of it")
    near = difflib.get_close_matches(wanted, SETTING_NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTING_NAMES)}"
    raise PromptError(f"there is no setting {name.strip()[:40]!r}: {hint}")


def typed_values(name: str) -> tuple[str, ...]:
    """Return the words that a setting takes, for completion; () for no such setting."""
    setting = _BY_NAME.get(name)
    if setting is None:
        return ()
    words = ("on", "off") if setting.words is _SWITCH else tuple(setting.words)
    return (*(word for word in words if word != "none"), _DEFAULT)
