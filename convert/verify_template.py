"""Checks of the chat template: what messages become, and that each of its copies is the same.

Each check gets a folder and a requirement's arguments from a data file, and returns what is wrong
in one line, None if nothing is. A template is rendered in Jinja's sandbox, as transformers does;
nothing else of a folder is run. Knows no prompt: the data files say what a template must give.
"""

from __future__ import annotations

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastvlm_mlx.convert.verify_folder import Folder, Json
from fastvlm_mlx.errors import one_line


def check_same_template(folder: Folder, requirement: Json) -> str | None:
    """The chat template is the same text in each of these files."""
    texts = {name: folder.template((name,)).strip() for name in requirement["files"]}
    first, *others = texts
    odd = [name for name in others if texts[name] != texts[first]]
    return f"{odd[0]} has another chat template than {first}" if odd else None


def check_template(folder: Folder, requirement: Json) -> str | None:
    """The chat template turns messages into a text: exactly `renders`, or with each of `holds`.

    `once` lists what must be there exactly once.
    """
    template = folder.template(tuple(requirement["files"]))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        text = environment.from_string(template).render(
            messages=requirement["messages"], add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, and may raise anything
        return f"the chat template fails on such messages: {one_line(str(error))}"
    if "renders" in requirement and text != requirement["renders"]:
        return f"the chat template gives {text!r}"
    missing = [part for part in requirement.get("holds", ()) if part not in text]
    missing += [part for part in requirement.get("once", ()) if text.count(part) != 1]
    return f"the chat template gives {text!r}: {missing[0]!r} is amiss" if missing else None


def _refuse(message: str) -> None:
    """`raise_exception` of transformers' templates."""
    raise TemplateError(message)
