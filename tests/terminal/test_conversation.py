"""A chat without a terminal: what each line does, and what becomes of what was not answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.errors import ContextFull, FastVLMError, ImageError, PromptError, SessionError
from fastvlm_mlx.events import Finished, TextDelta, TurnsDropped
from fastvlm_mlx.terminal.answers import Answer, Hold, Kind, NamedDrop, Request
from fastvlm_mlx.terminal.attached import PictureForm
from fastvlm_mlx.terminal.conversation import Conversation
from fastvlm_mlx.terminal.live_session import Opening
from fastvlm_mlx.terminal.remarks import cut_line, dropped_line
from fastvlm_mlx.terminal.replies import Reply, picture_line, reply, worth_offering
from fastvlm_mlx.terminal.settings import Settings

pytestmark = pytest.mark.slow  # many small ones: left to `make test`

PICTURES = Path(__file__).parents[2] / "examples" / "images"
CIRCLE = PICTURES / "red_circle.png"
CROSSES = PICTURES / "three_crosses_and_a_star.png"
WAIT_S = 60

T = TypeVar("T")
Open = Callable[..., Conversation]


@pytest.fixture
def open_chat() -> Iterator[Open]:
    chats: list[Conversation] = []

    def make(
        *,
        load: Callable[..., fv.Engine] | None = None,
        settings: Settings | None = None,
        form: PictureForm | None = None,
        **opening: object,
    ) -> Conversation:
        chat = Conversation(
            load or (lambda say, progress: fv.load("demo", say=say, progress=progress)),
            name="demo",
            settings=settings or Settings(),
            form=form or PictureForm(),
            opening=Opening(**opening),  # type: ignore[arg-type]
        )
        chats.append(chat)
        return chat

    yield make
    for chat in chats:
        chat.leave()
        assert chat._model.close(timeout_s=WAIT_S)


@pytest.fixture
def chat(open_chat: Open) -> Conversation:
    return open_chat()


def read(chat: Conversation, answer: Answer | None) -> str:
    """Read an answer to its end, as a user would."""
    assert answer is not None
    text = "".join(event.text for event in answer if isinstance(event, TextDelta))
    chat.settle(answer)
    return text


def say(chat: Conversation, line: str) -> str:
    return read(chat, reply(chat, line).answer)


def busy(chat: Conversation) -> threading.Event:
    """Keep the model's thread busy until the event is set."""
    release = threading.Event()
    chat._model.call(lambda _: release.wait(WAIT_S))
    return release


# ---- questions and pictures


def test_it_answers_as_the_engine_does(chat: Conversation) -> None:
    engine = fv.load("demo")
    wanted = engine.generate("What is this?", images=[CIRCLE]).text
    assert say(chat, f"{CIRCLE} What is this?") == wanted
    follow = engine.chat()
    follow.ask("What is this?", [CIRCLE])
    assert say(chat, "And the colour?") == follow.ask("And the colour?").text


def test_pictures_wait_for_the_next_question_and_go_with_it_once(chat: Conversation) -> None:
    said = reply(chat, f"{CIRCLE}")
    assert said.answer is None and len(said.pictures) == 1
    chat.ready()
    assert picture_line(chat, said.pictures[0]) == "[1] red_circle.png 256x256, 16 positions"
    assert chat.status.pending_images == 1
    say(chat, "What is this?")
    assert chat.pending == []
    assert reply(chat, "/images").lines == ("[1] red_circle.png, 16 positions",)


def test_a_waiting_picture_is_encoded_and_prefilled_before_the_question(chat: Conversation) -> None:
    reply(chat, f"{CIRCLE}")
    say(chat, "What is this?")
    assert chat.last is not None
    assert chat.last.encoded_images == 0
    assert chat.last.reused_tokens > 16


@pytest.mark.parametrize("line", ["{} ./missing.png What?", "./missing.png {}", "/image {} x.png"])
def test_of_several_pictures_one_bad_one_leaves_all_out_and_asks_nothing(
    chat: Conversation, line: str
) -> None:
    with pytest.raises(ImageError, match="no such file"):
        reply(chat, line.format(CIRCLE))
    assert chat.pending == []
    assert chat.ready().session.turns == 0


def test_a_picture_that_is_none_is_refused_while_the_model_loads(open_chat: Open) -> None:
    release = threading.Event()

    def load(**_: object) -> fv.Engine:
        release.wait(WAIT_S)
        return fv.load("demo")

    chat = open_chat(load=lambda say, progress: load())
    with pytest.raises(ImageError, match="is not a picture"):
        reply(chat, f"/image {__file__}")
    assert chat.status.loading is not None
    release.set()


def test_a_path_with_spaces_needs_no_quotes_after_image(chat: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "mein Bild über alles.png"
    path.write_bytes(CIRCLE.read_bytes())
    assert [p.name for p in reply(chat, f"/image {path}").pictures] == [path.name]


def test_pictures_of_another_size_are_looked_at_as_asked(open_chat: Open) -> None:
    chat = open_chat(form=PictureForm(resolution=128))
    reply(chat, f"{CIRCLE}")
    assert chat.ready().positions_per_picture == 4
    say(chat, "What is this?")
    assert chat.ready().pictures == (("red_circle.png", 4),)


def test_a_question_that_starts_with_a_slash_is_offered_so_that_it_stays_one(
    chat: Conversation,
) -> None:
    answer = reply(chat, "//etc/hosts is what?").answer
    assert answer is not None
    assert answer.request.text == "/etc/hosts is what?"
    assert answer.request.typed == "//etc/hosts is what?"
    read(chat, answer)


# ---- stopping


def test_a_question_stopped_before_its_turn_leaves_no_trace(chat: Conversation) -> None:
    reply(chat, f"{CIRCLE}")
    release = busy(chat)
    answer = reply(chat, "What is this?").answer
    assert answer is not None
    assert answer.stop()
    chat.settle(answer)
    release.set()
    assert answer.request.typed == "What is this?"
    assert not answer.kept
    assert chat.ready().session.turns == 0
    assert len(chat.pending) == 1
    assert (
        say(chat, "What is this?")
        == fv.load("demo").generate("What is this?", images=[CIRCLE]).text
    )


def test_an_answer_stopped_after_it_was_seen_is_kept_as_far_as_it_came(chat: Conversation) -> None:
    answer = reply(chat, f"{CROSSES} What is this?").answer
    assert answer is not None
    events = iter(answer)
    seen = [next(events)]
    answer.wake()
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert not answer.stop()
    seen += list(events)
    chat.settle(answer)
    assert isinstance(seen[-1], Finished)
    assert answer.kept
    assert chat.ready().session.turns == 1


@pytest.mark.parametrize("line", ["/retry", "/edit What shape?"])
def test_a_retry_stopped_before_its_first_token_keeps_the_old_turn(
    chat: Conversation, line: str
) -> None:
    """Kept or forgotten is decided under one lock: the model may have a token that nobody saw."""
    said = say(chat, f"{CIRCLE} What is this?")
    release = busy(chat)
    answer = reply(chat, line).answer
    assert answer is not None and answer.stop()
    release.set()
    chat.settle(answer)
    assert chat.ready().last_question == "What is this?"
    assert chat.ready().session.turns == 1
    assert say(chat, "/retry") == said


def test_forgetting_and_the_first_token_at_once_never_disagree(chat: Conversation) -> None:
    """The reader's stop and the model's first token race; the transcript must be as was said."""
    turns = 0
    chat.ready()
    for tries in range(40):
        answer = chat.ask("What is this?", typed="What is this?")
        time.sleep(tries / 4000)
        forgotten = answer.stop()
        for _event in () if forgotten else answer:
            pass
        chat.settle(answer)
        turns += answer.kept
        assert chat._model.call(lambda _: chat._live.session.turn_count).result(WAIT_S) == turns


def test_an_answer_nobody_began_to_read_is_stopped_and_kept_or_not_as_one(
    chat: Conversation,
) -> None:
    """Ctrl-C between the question's sending and its answer's drawing left a turn nobody saw."""
    release = busy(chat)
    reply(chat, f"{CIRCLE} What is this?")
    chat.abandon()
    release.set()
    assert chat.ready().session.turns == 0 and len(chat.pending) == 1
    answer = reply(chat, "What is this?").answer
    assert answer is not None
    answer.ended.result(WAIT_S)
    chat.abandon()
    assert answer.kept and chat.pending == []
    assert chat.ready().session.turns == 1


def test_ctrl_c_while_waiting_for_the_load_gives_up_the_command_only(open_chat: Open) -> None:
    """Cancelling what was waited for would have cancelled the opening of the session."""
    release = threading.Event()

    def load(**_: object) -> fv.Engine:
        release.wait(WAIT_S)
        return fv.load("demo")

    chat = open_chat(load=lambda say, progress: load())
    patient = chat.wait

    def interrupted(future: Future[T]) -> T:
        raise KeyboardInterrupt

    chat.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        reply(chat, "/system Short.")
    chat.wait = patient
    release.set()
    assert chat.ready().system == "You are a helpful assistant."
    with pytest.raises(KeyboardInterrupt):
        chat.wait = interrupted
        reply(chat, "/system Short.")
    chat.wait = patient
    assert say(chat, "What is this?")


@pytest.mark.parametrize("kind", ["ask", "retry", "edit"])
def test_a_first_token_that_comes_after_the_stop_is_forgotten(
    chat: Conversation, kind: Kind
) -> None:
    """The model asks between its passes whether to stop, and most prompts are one pass."""
    say(chat, f"{CIRCLE} What is this?")
    hold = Hold()
    assert hold.stop()
    hold.cancelled = lambda: False  # type: ignore[method-assign] (it was asked just before)
    request = Request(kind=kind, text="And now?", settings=chat.settings)
    events = chat._model.call(lambda engine: list(chat._live.answer(engine, request, hold)))
    assert events.result(WAIT_S) == []
    assert chat.ready().session.turns == 1
    assert chat.ready().last_question == "What is this?"


def test_an_error_keeps_pictures_and_question(chat: Conversation) -> None:
    reply(chat, f"{CIRCLE}")
    answer = reply(chat, "word " * 2000).answer
    with pytest.raises(PromptError, match="the model has 1024"):
        read(chat, answer)
    chat.settle(answer)  # type: ignore[arg-type]
    assert len(chat.pending) == 1
    assert chat.ready().session.turns == 0


def test_dropped_turns_are_told_before_the_answer(open_chat: Open) -> None:
    chat = open_chat(settings=Settings(overflow="drop", max_tokens=2))
    for _ in range(3):
        say(chat, "word " * 150)
    answer = reply(chat, "word " * 300).answer
    assert answer is not None
    events = list(answer)
    chat.settle(answer)
    assert isinstance(events[0], TurnsDropped)
    assert events[0].turns >= 1


def test_dropped_turns_are_told_with_the_names_of_their_pictures(open_chat: Open) -> None:
    """It said "the oldest 14 turn were dropped with picture": which, nobody could tell."""
    chat = open_chat(settings=Settings(overflow="drop", max_tokens=1))
    say(chat, f"{CIRCLE} " + "word " * 80)
    for _ in range(2):
        say(chat, "word " * 80)
    answer = reply(chat, "word " * 240).answer
    assert answer is not None
    dropped = [dropped_line(event) for event in answer if isinstance(event, TurnsDropped)]
    chat.settle(answer)
    assert dropped == [
        "the context is full: the oldest 3 turns were dropped, with red_circle.png: "
        "give it again to ask about it"
    ]
    assert cut_line(answer) in ("", "the answer was cut at 1 token (max_tokens)")


@pytest.mark.parametrize(
    ("dropped", "words"),
    [
        (TurnsDropped(1, 0), "the oldest turn was dropped"),
        (NamedDrop(2, 1, ("a.png",)), "the oldest 2 turns were dropped, with a.png: give it again"),
        (NamedDrop(1, 2, ("a", "b")), "the oldest turn was dropped, with a and b: give them again"),
        (NamedDrop(9, 6, tuple("abcdef")), "with a, b, c, d and 2 more: give them"),
    ],
)
def test_what_was_dropped_is_said_in_the_right_number(dropped: TurnsDropped, words: str) -> None:
    assert words in dropped_line(dropped)


def test_a_full_context_says_which_commands_help(chat: Conversation) -> None:
    with pytest.raises(ContextFull) as first:
        read(chat, reply(chat, "word " * 2000).answer)
    assert "/undo" not in str(first.value)
    say(chat, "What is this?")
    with pytest.raises(ContextFull, match=r"\(/undo, /drop N or /set overflow drop\)$"):
        read(chat, reply(chat, "word " * 2000).answer)


# ---- commands


def test_undo_takes_turns_back(chat: Conversation) -> None:
    for question in ("one", "two", "three"):
        say(chat, question)
    assert reply(chat, "/undo").lines == ("took back 'three'",)
    with pytest.raises(PromptError, match=r"no turn 99 .* has 2 turns$"):
        reply(chat, "/undo 99")
    reply(chat, "/undo 2")
    assert chat.ready().session.turns == 0
    with pytest.raises(PromptError, match="nothing was asked yet"):
        reply(chat, "/undo")


def test_undo_names_the_pictures_it_took_back(chat: Conversation) -> None:
    say(chat, f"{CIRCLE} What is this?")
    say(chat, f"{CROSSES} And these?")
    assert reply(chat, "/undo").lines == (f"took back 'And these?' and {CROSSES.name}",)
    assert [name for name, _ in chat.ready().pictures] == [CIRCLE.name]


def test_edit_offers_the_question_and_asks_another_with_its_pictures(chat: Conversation) -> None:
    say(chat, f"{CIRCLE} What is this?")
    assert reply(chat, "/edit").offered == "/edit What is this?"
    edited = say(chat, "/edit What colour is it?")
    assert edited == fv.load("demo").generate("What colour is it?", images=[CIRCLE]).text
    assert chat.ready().session.turns == 1
    assert chat.ready().last_question == "What colour is it?"


def test_edit_with_a_picture_adds_it_to_the_question(chat: Conversation) -> None:
    say(chat, f"{CIRCLE} What is this?")
    say(chat, f"/edit {CROSSES} What are these?")
    assert [name for name, _ in chat.ready().pictures] == [CIRCLE.name, CROSSES.name]


def test_retry_with_other_settings_leaves_the_chats_own(chat: Conversation) -> None:
    say(chat, "What is this?")
    answer = reply(chat, "/retry temperature=0.9 max_tokens=1").answer
    read(chat, answer)
    assert answer is not None and answer.finished is not None
    assert answer.finished.stats.generated_tokens == 1
    assert chat.settings == Settings()


def test_drop_counts_as_images_lists(chat: Conversation) -> None:
    say(chat, f"{CIRCLE} {CROSSES} What are these?")
    reply(chat, f"{PICTURES / 'number_42.png'}")
    assert [line[:3] for line in reply(chat, "/images").lines] == ["[1]", "[2]", "[3]"]
    assert reply(chat, "/drop 3").lines == ("dropped [3] number_42.png",)
    assert chat.pending == []
    reply(chat, "/drop 1")
    assert [name for name, _ in chat.ready().pictures] == [CROSSES.name]
    with pytest.raises(PromptError, match=r"no picture 2: the conversation has 1 picture$"):
        reply(chat, "/drop 2")


def test_system_is_shown_set_and_left_out(chat: Conversation) -> None:
    assert reply(chat, "/system").lines == ("You are a helpful assistant.",)
    reply(chat, "/system Answer in one word.")
    assert reply(chat, "/system").lines == ("Answer in one word.",)
    reply(chat, '/system ""')
    assert chat.ready().system == ""


def test_clear_keeps_system_settings_and_features(chat: Conversation) -> None:
    reply(chat, "/system Short.")
    reply(chat, "/set max_tokens 7")
    say(chat, f"{CIRCLE} What is this?")
    said = reply(chat, "/clear")
    assert "1 turn was not saved" in said.lines[0] and said.offered == "/clear"
    assert chat.ready().session.turns == 1
    assert reply(chat, "/clear").lines == ("a new conversation",)
    assert chat.ready().session.turns == 0 and chat.ready().pictures == ()
    assert chat.ready().system == "Short." and chat.settings.max_tokens == 7
    say(chat, f"{CIRCLE} What is this?")
    assert chat.last is not None and chat.last.encoded_images == 0


def test_set_shows_and_changes(chat: Conversation) -> None:
    assert any(line.startswith("temperature") for line in reply(chat, "/set").lines)
    assert reply(chat, "/set temperature 0.5").lines == ("temperature 0.5",)
    assert reply(chat, "/set top_p=0.9").lines == ("top_p 0.9",)
    with pytest.raises(FastVLMError, match="max_tokens"):
        reply(chat, "/set max_tokens 0")
    assert chat.settings.max_tokens == 256


def test_stats_and_help_have_lines(chat: Conversation) -> None:
    say(chat, "What is this?")
    assert any("positions used" in line for line in reply(chat, "/stats").lines)
    assert all(len(line) <= 40 for line in reply(chat, "/help", columns=40).lines)
    assert reply(chat, "/quit").leaves
    assert reply(chat, "  ") == Reply()


# ---- files


def test_a_session_is_kept_after_every_turn_and_gone_on_with(
    open_chat: Open, tmp_path: Path
) -> None:
    file = tmp_path / "trip.chat"
    first = open_chat(file=file)
    said = say(first, f"{CIRCLE} What is this?")
    assert first.leave()
    assert not first.kept.unsaved
    second = open_chat(file=file)
    assert second.ready().session.turns == 1
    assert second.news.take() == []
    assert say(second, "/retry") == said
    assert second.leave()


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "talk: 1 turn, 1 picture; last question: What is this?"),
        (50, "talk: 1 turn, 1 picture; last question: What is t…"),
    ],
)
def test_a_file_gone_on_with_says_what_it_holds(
    open_chat: Open, tmp_path: Path, columns: int, shown: str
) -> None:
    file = tmp_path / "talk"
    first = open_chat(file=file)
    first.ready()
    assert first.resumed(80) == ""
    say(first, f"{CIRCLE} What is this?")
    first.leave()
    second = open_chat(file=file)
    second.ready()
    assert second.resumed(columns) == shown


def test_an_answer_under_way_is_saved_as_far_as_it_was_seen(
    open_chat: Open, tmp_path: Path
) -> None:
    file = tmp_path / "trip.chat"
    chat = open_chat(file=file)
    answer = reply(chat, f"{CROSSES} What is this?").answer
    assert answer is not None
    next(answer)
    chat.leave()
    assert chat._model.close(timeout_s=WAIT_S)
    assert open_chat(file=file).ready().session.turns == 1


def test_a_save_that_fails_is_said_once_and_the_chat_goes_on(
    open_chat: Open, tmp_path: Path
) -> None:
    file = tmp_path / "folder" / "trip.chat"
    chat = open_chat(file=file)
    for _ in range(3):
        say(chat, "What is this?")
    assert chat.kept._last is not None and chat.kept._last.exception(WAIT_S) is not None
    notes = [note for note in chat.news.take() if "not saved" in note]
    assert len(notes) == 1
    assert chat.kept.unsaved
    file.parent.mkdir()
    say(chat, "And now?")
    chat.kept._last.result(WAIT_S)
    assert not chat.kept.unsaved


def test_a_file_that_is_no_session_is_refused_and_left_alone(
    open_chat: Open, tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("my notes")
    chat = open_chat(file=file)
    with pytest.raises(SessionError, match=r"notes\.txt"):
        chat.ready()
    chat.leave()
    assert file.read_text() == "my notes"


def test_a_damaged_file_is_kept_beside_before_the_first_save(
    open_chat: Open, tmp_path: Path
) -> None:
    """The picture was lost, the words stay; the next save would have written over the evidence."""
    file = tmp_path / "trip.chat"
    first = open_chat(file=file)
    say(first, f"{CIRCLE} What is this?")
    first.leave()
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) - 1000])
    damaged = file.read_bytes()
    chat = open_chat(file=file)
    chat.ready()
    assert any("trip.chat" in note for note in chat.news.take())
    assert not file.with_name("trip.chat.damaged").exists()
    say(chat, "And now?")
    chat.leave()
    assert file.with_name("trip.chat.damaged").read_bytes() == damaged
    assert chat.news.take() == ["kept as trip.chat.damaged"]
    again = open_chat(file=file)
    assert again.ready().session.turns == 2
    assert again.news.take() == []


def test_loading_over_unsaved_turns_asks_for_the_same_command_again(
    chat: Conversation, tmp_path: Path
) -> None:
    say(chat, "What is this?")
    first, second = tmp_path / "a.chat", tmp_path / "b.chat"
    assert reply(chat, f"/save {first}").lines == (f"saved to {first}",)
    say(chat, "And this?")
    said = reply(chat, f"/load {first}")
    assert "2 turns was not saved" in said.lines[0] and said.offered == f"/load {first}"
    assert chat.ready().session.turns == 2
    reply(chat, f"/save {second}")
    assert reply(chat, f"/load {first}").lines == ("1 turn loaded",)
    say(chat, "More?")
    reply(chat, f"/load {second}")
    assert reply(chat, f"/load {second}").lines == ("2 turns loaded",)


def test_clearing_a_kept_conversation_says_what_becomes_of_its_file(
    open_chat: Open, tmp_path: Path
) -> None:
    """The conversation and its file were gone at one word, without a question."""
    file, other = tmp_path / "trip.chat", tmp_path / "other.chat"
    chat = open_chat(file=file)
    say(chat, "What is this?")
    said = reply(chat, "/clear")
    assert said.lines[0].startswith(f"{file} will hold the new conversation: /save OTHER keeps")
    assert reply(chat, f"/save {other}").lines == (f"saved to {other}",)
    assert reply(chat, "/clear").lines == ("a new conversation",)
    assert reply(chat, "/clear").lines == ("a new conversation",)
    say(chat, "And now?")
    chat.leave()
    assert open_chat(file=file).ready().last_question == "And now?"
    assert open_chat(file=other).ready().last_question == "What is this?"


def test_a_loaded_conversation_is_kept_in_its_own_file_and_that_is_said(
    open_chat: Open, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.chat", tmp_path / "b.chat"
    chat = open_chat(file=first)
    say(chat, "What is this?")
    assert reply(chat, f"/save {second}").lines == (f"saved to {second}",)
    assert reply(chat, f"/load {second}").lines == (f"1 turn loaded; kept in {second} from now on",)
    assert reply(chat, f"/load {second}").lines == ("1 turn loaded",)


def test_two_chats_on_one_file_lose_nothing(open_chat: Open, tmp_path: Path) -> None:
    """The one that saved last had the file; the other's turns were gone without a word."""
    file, other = tmp_path / "talk", tmp_path / "other"
    first, second = open_chat(file=file), open_chat(file=file)
    first.ready()
    second.ready()
    say(first, "One?")
    assert not first.unsaved()
    for _ in range(2):
        say(second, "Two?")
    assert second.unsaved()
    assert second.news.take() == [
        f"{file} was changed by another program: this conversation is not saved to it; "
        "/save another file"
    ]
    assert "2 turns was not saved" in reply(second, "/clear").lines[0]
    assert reply(second, f"/save {other}").lines == (
        f"saved to {other}; kept in {other} from now on",
    )
    say(second, "Three?")
    assert not second.unsaved()
    say(first, "Four?")
    assert not first.unsaved() and first.news.take() == []
    assert open_chat(file=file).ready().session.turns == 2
    assert open_chat(file=other).ready().session.turns == 3


def test_a_file_that_another_chat_changed_after_it_was_read_is_not_written_over(
    open_chat: Open, tmp_path: Path
) -> None:
    file = tmp_path / "talk"
    say(first := open_chat(file=file), "One?")
    first.leave()
    second, third = open_chat(file=file), open_chat(file=file)
    second.ready()
    third.ready()
    say(second, "Two?")
    assert not second.unsaved()
    say(third, "Three?")
    assert third.unsaved()
    file.unlink()  # nothing is left to lose
    say(third, "Four?")
    assert not third.unsaved()


def test_saving_over_another_conversation_asks_for_the_same_command_again(
    open_chat: Open, tmp_path: Path
) -> None:
    file = tmp_path / "talk"
    say(first := open_chat(file=file), "One?")
    first.leave()
    chat = open_chat()
    say(chat, "Two?")
    said = reply(chat, f"/save {file}")
    assert said.lines[0].startswith(f"{file} holds another conversation")
    assert said.offered == f"/save {file}" and chat.unsaved()
    assert open_chat(file=file).ready().last_question == "One?"
    assert reply(chat, f"/save {file}").lines == (f"saved to {file}",)
    say(chat, "Three?")
    assert reply(chat, "/save").lines == (f"saved to {file}",)
    assert open_chat(file=file).ready().session.turns == 2
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(SessionError, match="no session"):
        reply(chat, f"/save {tmp_path / 'notes.txt'}")


def test_a_load_that_fails_leaves_the_conversation(chat: Conversation, tmp_path: Path) -> None:
    say(chat, "What is this?")
    reply(chat, f"/save {tmp_path / 'a.chat'}")
    (tmp_path / "none.chat").write_text("no session")
    with pytest.raises(SessionError):
        reply(chat, f"/load {tmp_path / 'none.chat'}")
    with pytest.raises(PromptError, match="no such file"):
        reply(chat, "/load missing.chat")
    assert chat.ready().session.turns == 1


# ---- a line that failed


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("What is this?", True),
        ("./missing.png What?", True),
        ("//etc/hosts is what?", True),
        ("/edit What shape?", True),
        ("/sys Be brief.", True),
        ("/edit", False),
        ("/imagse", False),
        ("/load nowhere.chat", False),
        ("/quit now", False),
    ],
)
def test_a_text_that_failed_is_offered_again_and_a_command_is_not(line: str, offered: bool) -> None:
    """The next line was typed behind the command that had failed."""
    assert worth_offering(line) is offered


# ---- a model that is not to be had


def test_a_load_that_fails_is_raised_by_whatever_waits(open_chat: Open) -> None:
    chat = open_chat(load=lambda say, progress: fv.load("./nowhere"))
    answer = chat.ask("What is this?", typed="What is this?")
    with pytest.raises(FastVLMError, match="nowhere"):
        next(answer)
    with pytest.raises(FastVLMError, match="nowhere"):
        chat.check()
    assert answer.request.typed == "What is this?"


def test_progress_is_in_the_status_until_the_session_is_open(open_chat: Open) -> None:
    release = threading.Event()

    def load(say: Callable[[str], None], progress: Callable[[int, int, str], None]) -> fv.Engine:
        progress(1, 4, "Loading weights")
        release.wait(WAIT_S)
        return fv.load("demo")

    chat = open_chat(load=load)
    while not chat.status.loading:
        pass
    assert chat.status.loading == "25%"
    release.set()
    chat.ready()
    assert chat.status.loading is None and chat.status.max_positions == 1024


def test_the_time_to_the_first_token_counts_from_when_the_question_was_entered(
    chat: Conversation,
) -> None:
    """It was the model's own: what the user waited for before, a load say, was left out."""
    chat.ready()
    release = busy(chat)
    answer = reply(chat, "What is this?").answer
    entered = time.perf_counter()
    assert answer is not None
    time.sleep(0.2)
    waited_ms = (time.perf_counter() - entered) * 1000
    release.set()
    read(chat, answer)
    assert chat.last is not None and chat.last.ttft_ms is not None
    assert chat.last.ttft_ms >= waited_ms
