"""What each typed line does: the commands, and questions with pictures in them.

Text in, a `Reply` out; how it is shown is the caller's. Raises FastVLMError, one line, and then
nothing has changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlm_mlx.errors import PromptError, one_line
from fastvlm_mlx.terminal import clipboard
from fastvlm_mlx.terminal.answers import Answer
from fastvlm_mlx.terminal.attached import Attached, attach
from fastvlm_mlx.terminal.commands import Typed, help_lines, parse, set_lines
from fastvlm_mlx.terminal.conversation import Conversation
from fastvlm_mlx.terminal.dropped import split_dropped, typed_path, typed_sources
from fastvlm_mlx.terminal.live_session import OtherConversation
from fastvlm_mlx.terminal.remarks import listed
from fastvlm_mlx.terminal.status import counted, stats_lines, stats_rows

_SHOWN_OF_A_QUESTION = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """`lines` to show, then `pictures`, then the answer to read; `offered` is typed already for
    the next line; `leaves` ends the chat. `asks` is whether the same command, again, is needed to
    do it; `loses_saved` whether it would cost a conversation that a file holds."""

    lines: tuple[str, ...] = ()
    pictures: tuple[Attached, ...] = ()
    answer: Answer | None = None
    offered: str = ""
    leaves: bool = False
    asks: bool = False
    loses_saved: bool = False


def reply(chat: Conversation, line: str, *, columns: int = 80, can_offer: bool = True) -> Reply:
    """Do what a line says; `can_offer` is whether `offered` can be changed there before it is sent.

    Raises FastVLMError.
    """
    if not line.strip():
        return Reply()
    typed = parse(line)
    if typed.command is None:
        if line.startswith("//"):  # said to be text, a file's path or not
            return Reply(answer=chat.ask(typed.argument, typed=line))
        return _question(chat, typed.argument)
    if typed.command.name == "help":
        return Reply(lines=tuple(help_lines(columns)))
    if typed.command.name == "stats":
        return _stats(chat, columns)
    if typed.command.name == "set":
        return _set(chat, typed, columns)
    if typed.command.name == "edit" and not typed.argument and not can_offer:
        last = one_line(_last_question(chat))
        line = f"the last question was: {last}; /edit TEXT asks another"
        return Reply(lines=(line,))
    return _COMMANDS[typed.command.name](chat, typed)


def worth_offering(line: str) -> bool:
    """Return whether a line that failed is typed again: a text is, another command is not."""
    try:
        typed = parse(line)
    except PromptError:
        return False
    if typed.command is None:
        return True
    return typed.command.name in ("edit", "system") and bool(typed.argument)


def picture_line(chat: Conversation, picture: Attached) -> str:
    """Return `[1] desk.jpg 1024x768, 256 positions`, as far as it is known yet."""
    line = f"{picture.name} {picture.width}x{picture.height}"
    facts = chat.facts
    if facts is not None:
        line += f", {facts.positions_per_picture} positions"
    if facts is None and chat.kept.path is not None:
        return line  # the file's pictures come first, and are not counted yet
    before = len(facts.pictures) if facts is not None else 0
    return f"[{before + chat.pending.index(picture) + 1}] {line}"


def _question(chat: Conversation, line: str) -> Reply:
    dropped = split_dropped(line)
    # All of them, or none: what is wrong with one is said before another is taken.
    pictures = tuple(attach(source, chat.form) for source in dropped.sources)
    chat.add(pictures)
    text = dropped.text.strip() if pictures else dropped.text
    if not text:
        return Reply(pictures=pictures)
    typed = f"/{text}" if text.startswith("/") else text
    return Reply(pictures=pictures, answer=chat.ask(text, typed=typed))


def _image(chat: Conversation, typed: Typed) -> Reply:
    if not typed.argument:
        data = clipboard.picture_in_clipboard()
        if data is None:
            raise PromptError("the clipboard holds no picture: copy one, or /image PATH")
        pictures = [attach(data, chat.form, name="clipboard")]
    else:
        pictures = [attach(source, chat.form) for source in typed_sources(typed.argument)]
    chat.add(pictures)
    return Reply(pictures=tuple(pictures))


def _images(chat: Conversation, _typed: Typed) -> Reply:
    facts = chat.ready()
    lines = [
        f"[{number}] {one_line(name)}, {positions} positions"
        for number, (name, positions) in enumerate(facts.pictures, 1)
    ]
    lines += [f"{picture_line(chat, p)}, goes with the next question" for p in chat.pending]
    return Reply(lines=tuple(lines) or ("no pictures: type or drag a path, or /image PATH",))


def _drop(chat: Conversation, typed: Typed) -> Reply:
    number = typed.number()
    facts = chat.ready()
    names = [name for name, _ in facts.pictures] + [picture.name for picture in chat.pending]
    if number > len(names):
        had = counted(len(names), "picture") if names else "no pictures"
        raise PromptError(f"there is no picture {number}: the conversation has {had}")
    chat.drop(number - 1)
    return Reply(lines=(f"dropped [{number}] {one_line(names[number - 1])}",))


def _retry(chat: Conversation, typed: Typed) -> Reply:
    settings = chat.settings.changed_all(typed.argument)
    if not chat.ready().session.turns:
        raise PromptError("nothing was asked yet: there is nothing to retry")
    return Reply(answer=chat.ask("", kind="retry", settings=settings))


def _undo(chat: Conversation, typed: Typed) -> Reply:
    turns = typed.number(default=1)
    facts = chat.ready()
    if turns > facts.session.turns:
        had = facts.session.turns
        raise PromptError(
            f"there is no turn {turns} to take back: the conversation has {counted(had, 'turn')}"
            if had
            else "nothing was asked yet: there is nothing to take back"
        )
    last = facts.last_question or ""
    chat.rewind(turns)
    what = f"{_shortened(last)!r}" if turns == 1 else f"the last {turns} turns"
    names = [name for name, _ in facts.pictures[len(chat.ready().pictures) :]]
    return Reply(lines=(f"took back {what}" + (f" and {listed(names)}" if names else ""),))


def _edit(chat: Conversation, typed: Typed) -> Reply:
    last = _last_question(chat)
    if not typed.argument:
        return Reply(lines=("change the question and press Enter:",), offered=f"/edit {last}")
    dropped = split_dropped(typed.argument)
    pictures = tuple(attach(source, chat.form) for source in dropped.sources)
    text = dropped.text.strip()
    if not text:
        raise PromptError("/edit takes a question; /image adds a picture to the next one")
    answer = chat.ask(text, kind="edit", pictures=pictures, typed=f"/edit {typed.argument}")
    return Reply(answer=answer)


def _last_question(chat: Conversation) -> str:
    last = chat.ready().last_question
    if last is None:
        raise PromptError("nothing was asked yet: there is nothing to edit")
    return last


def _system(chat: Conversation, typed: Typed) -> Reply:
    if not typed.argument:
        system = chat.ready().system
        return Reply(lines=(system or "there is no system message",))
    text = "" if typed.argument in ('""', "''") else typed.argument
    chat.set_system(text)
    return Reply(lines=("the system message is changed" if text else "no system message from now",))


def _set(chat: Conversation, typed: Typed, columns: int) -> Reply:
    name, _, value = typed.argument.replace("=", " ", 1).partition(" ")
    if not value:
        rows = [chat.settings.row(name)] if name else chat.settings.rows()
        return Reply(lines=tuple(set_lines(rows, columns)))
    before = {name: value for name, value, _ in chat.settings.rows()}
    chat.settings = chat.settings.changed(name, value)
    lines = [f"{n} {v}" for n, v, _ in chat.settings.rows() if before[n] != v]
    return Reply(lines=tuple(lines) or ("that is what it was",))


def _stats(chat: Conversation, columns: int) -> Reply:
    session = replace(chat.ready().session, load_ms=chat.news.load_ms)
    return Reply(lines=tuple(stats_lines(stats_rows(session, chat.last), columns)))


def _save(chat: Conversation, typed: Typed) -> Reply:
    file = typed_path(typed.argument) if typed.argument else chat.kept.path
    if file is None:
        raise PromptError("/save needs a FILE to write to")
    shown, before = one_line(str(file)), chat.kept.path
    this = ("save", file)
    try:
        chat.save(file, replace=chat.kept.given_up == this)
    except OtherConversation:
        chat.kept.given_up = this
        return Reply(
            lines=(f"{shown} holds another conversation: the same /save again replaces it",),
            offered=f"/save {typed.argument}".rstrip(),
            asks=True,
            loses_saved=True,
        )
    return Reply(lines=(f"saved to {shown}{_kept_now(chat, before)}",))


def _load(chat: Conversation, typed: Typed) -> Reply:
    file = typed_path(typed.argument)
    if not file.is_file():
        raise PromptError(f"{one_line(str(file))}: no such file")
    turns, before = chat.ready().session.turns, chat.kept.path
    this = ("load", file)
    if turns and chat.unsaved() and chat.kept.given_up != this:
        chat.kept.given_up = this
        return Reply(
            lines=(f"{_not_saved(turns)}: /save FILE keeps it, the same /load again gives it up",),
            offered=f"/load {typed.argument}",
            asks=True,
        )
    lines = chat.load(file)
    loaded = f"{counted(chat.ready().session.turns, 'turn')} loaded"
    return Reply(lines=(*lines, f"{loaded}{_kept_now(chat, before)}"))


def _clear(chat: Conversation, _typed: Typed) -> Reply:
    turns, kept = chat.ready().session.turns, chat.kept
    this = ("clear", None)
    if turns and (chat.unsaved() or kept.by_itself) and kept.given_up != this:
        kept.given_up = this
        saved = kept.by_itself and not kept.refused
        if saved:
            line = (
                f"{one_line(str(kept.path))} will hold the new conversation: /save OTHER keeps "
                "this one, the same /clear again begins"
            )
        else:
            line = f"{_not_saved(turns)}: /save FILE keeps it, the same /clear again gives it up"
        return Reply(lines=(line,), offered="/clear", asks=True, loses_saved=saved)
    chat.clear()
    return Reply(lines=("a new conversation",))


def _not_saved(turns: int) -> str:
    return f"the conversation of {counted(turns, 'turn')} was not saved"


def _kept_now(chat: Conversation, before: Path | None) -> str:
    """Return where a conversation that is saved by itself is kept from now on, if that is new."""
    path = chat.kept.path
    if not chat.kept.by_itself or path is None or before is None or _same(path, before):
        return ""
    return f"; kept in {one_line(str(path))} from now on"


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _quit(_chat: Conversation, _typed: Typed) -> Reply:
    return Reply(leaves=True)


_COMMANDS: dict[str, Callable[[Conversation, Typed], Reply]] = {
    "image": _image,
    "images": _images,
    "drop": _drop,
    "retry": _retry,
    "undo": _undo,
    "edit": _edit,
    "system": _system,
    "save": _save,
    "load": _load,
    "clear": _clear,
    "quit": _quit,
}


def _shortened(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _SHOWN_OF_A_QUESTION else f"{text[: _SHOWN_OF_A_QUESTION - 1]}…"
