"""A conversation that computes nothing twice: turns, and the KV cache of what they share.

Each turn renders the whole transcript and compares it, position by position, with what the cache
holds; only what comes after the longest common prefix is prefilled. Positions are compared as
what they are: a token id, or one row of a picture with a given digest. So a picture counts as its
256 positions, another picture in its place is no match, and warm answers equal cold ones.

Going back, asking again, editing, dropping a picture and forking change the transcript only; what
the cache can still give is found by the same comparison. The transcript changes only when an
answer is whole, or is kept as far as it came.

Bytes held: the transcript; the cache's buffers, for at most the context's positions and 255 more;
and of each picture still in the transcript its pixels, 12,288 bytes a position, and features.

Knows no terminal, and of files only that a session can be written to one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import TypedDict, Unpack, get_args

from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.events import ChatEvent, Finished, Generation, TextDelta, TurnsDropped
from fastvlm_mlx.generate.clock import Clock
from fastvlm_mlx.generate.context import Fitted, Overflow, certain_length, fit, lay_out
from fastvlm_mlx.generate.options import AnswerOptions, ImageOptions, Picture, listed
from fastvlm_mlx.generate.pipeline import Pipeline
from fastvlm_mlx.generate.transcript import Transcript, Turn
from fastvlm_mlx.generate.warm import WarmDecoder
from fastvlm_mlx.model.fastvlm import ShownImage, StoredImage
from fastvlm_mlx.prompt.sources import source_name
from fastvlm_mlx.prompt.template import DEFAULT_SYSTEM, Message, user_message
from fastvlm_mlx.sampling import GREEDY, Sampling

log = logging.getLogger("fastvlm_mlx")

Events = Generator[ChatEvent, None, None]
# Gives a question when an answer to it begins; None if it was cancelled before.
_Ask = Callable[[Clock, Callable[[], bool]], Turn | None]


class TurnOptions(TypedDict, total=False):
    """The options of `ChatSession.stream`, which has their meaning and defaults."""

    max_tokens: int
    sampling: Sampling | None
    stop: Sequence[str]
    profile: bool
    cancelled: Callable[[], bool]
    keep_partial: bool


class ChatSession:
    """One conversation. Use it from one thread, one answer at a time.

    `sampling` and `overflow` may be set between answers. `overflow` says what happens when the
    conversation outgrows the model's context: "refuse" raises PromptError, "drop" forgets the
    oldest questions with their answers and pictures, and says so with TurnsDropped. `kv_bits` 8 or
    4 packs the KV cache (mlx-lm's affine form): less memory, answers that may differ. `damage` has
    a line for each thing that the file it was resumed from had lost.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        sampling: Sampling = GREEDY,
        system: str = DEFAULT_SYSTEM,
        overflow: Overflow = "refuse",
        kv_bits: int | None = None,
    ) -> None:
        self.sampling = sampling
        self.overflow = overflow
        self.damage: tuple[str, ...] = ()
        self._pipeline = pipeline
        self._transcript = Transcript.begin(system)
        self._warm = WarmDecoder(pipeline, kv_bits)
        self._answering = False

    def __repr__(self) -> str:
        return (
            f"ChatSession({self.turn_count} turns, {len(self.images)} pictures, "
            f"{self.positions} of {self.max_positions} positions)"
        )

    @classmethod
    def resume(
        cls,
        pipeline: Pipeline,
        path: str | os.PathLike[str],
        *,
        sampling: Sampling = GREEDY,
        overflow: Overflow = "refuse",
        kv_bits: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> ChatSession:
        """Return the conversation that `save` wrote to `path`.

        Its KV cache is taken if it is this model's; `kv_bits` None takes its packing too. `say`
        gets a line for what is damaged and lost, and one if the KV must be computed again, which
        the next answer does, or `prepare`. Raises SessionError for what is no session file, or of
        a newer version; ConfigError for pictures of a size that this model's grid lacks.
        """
        # Here and in `save`: a session's file takes 10 ms to import, and most answers need none.
        from fastvlm_mlx.generate.resume import kv_of, transcript_of
        from fastvlm_mlx.generate.session_file import read_session

        tell = say or log.warning
        saved = read_session(path)
        for line in saved.damage:
            tell(f"{source_name(path)}: {line}")
        chat = cls(pipeline, sampling=sampling, overflow=overflow)
        chat.damage = saved.damage
        chat._transcript = transcript_of(pipeline, saved)
        chat._warm.kv = kv_of(pipeline, saved, kv_bits, tell)
        return chat

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write transcript, pictures' pixels and KV cache to a file: whole, or not at all.

        Settings are not saved. Replaces nothing but a session file. Raises SessionError.
        """
        from fastvlm_mlx.generate.resume import to_saved
        from fastvlm_mlx.generate.session_file import write_session

        self._require_idle()
        write_session(path, to_saved(self._pipeline, self._transcript, self._warm.kv))

    @property
    def messages(self) -> tuple[Message, ...]:
        """The transcript: the system message, then whole turns of question and answer."""
        return self._transcript.messages

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """All pictures in the transcript, in order; any can be given to another question."""
        return self._transcript.images

    @property
    def turn_count(self) -> int:
        """How many questions have been answered."""
        return self._transcript.pairs

    @property
    def last_question(self) -> str | None:
        """The text of the latest question answered; None if there is none."""
        return self._transcript.last_question.text if self.turn_count else None

    @property
    def last_images(self) -> tuple[ShownImage, ...]:
        """The pictures of the latest question answered; none if there is none."""
        return self._transcript.last_question.images if self.turn_count else ()

    @property
    def system(self) -> str:
        """The system message's text; empty if it is left out."""
        return self._transcript.turns[0].text

    @property
    def positions(self) -> int:
        """Embedding positions the transcript takes up in the context."""
        turns = self._transcript.turns
        whole = lay_out(self._pipeline.processor, turns, generation_prompt=False)
        return len(whole.positions)

    @property
    def max_positions(self) -> int:
        """Embedding positions of the model's context, the answer's included."""
        return self._pipeline.model.config.decoder.max_positions

    @property
    def overflow(self) -> Overflow:
        """What happens when the context is full; setting it raises ConfigError for other words."""
        return self._overflow

    @overflow.setter
    def overflow(self, overflow: Overflow) -> None:
        if overflow not in get_args(Overflow):
            raise ConfigError(f"overflow is refuse or drop, not {overflow!r}")
        self._overflow: Overflow = overflow

    @property
    def kv_bits(self) -> int | None:
        """Bits the KV cache is packed into; None if it holds floats."""
        return self._warm.kv.kv_bits

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache's buffers."""
        return self._warm.kv.nbytes

    def set_system(self, text: str) -> None:
        """Replace the system message; every turn is read again after it."""
        self._require_idle()
        self._transcript = self._transcript.with_system(text)

    def rewind(self, turns: int = 1) -> None:
        """Forget the last questions and their answers; what stays is not computed again.

        Raises PromptError if there are fewer.
        """
        self._require_idle()
        self._transcript = self._transcript.without_last(turns)

    def drop_image(self, index: int) -> None:
        """Take picture `index` of `images` out of the question it was given with.

        What comes before it stays computed. Raises PromptError if there is no such picture.
        """
        self._require_idle()
        self._transcript = self._transcript.without_image(index)

    def fork(self) -> ChatSession:
        """Return a second conversation with this one's past; from now on each goes its own way.

        They share the KV cache until either writes to it.
        """
        self._require_idle()
        twin = ChatSession(self._pipeline, sampling=self.sampling, overflow=self.overflow)
        twin._transcript, twin._warm = self._transcript, self._warm.fork()
        return twin

    def ask(
        self,
        text: str,
        images: Sequence[Picture] = (),
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Answer one turn whole; the arguments and errors are `stream`'s."""
        return collect(
            self.stream(text, images, max_tokens=max_tokens, sampling=sampling, stop=stop)
        )

    def stream(
        self,
        text: str,
        images: Sequence[Picture] = (),
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        profile: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
        keep_partial: bool = False,
    ) -> Events:
        """Yield the answer to `text` and `images` after the turns so far.

        `sampling` overrides the session's for this turn. `cancelled` is asked before each picture,
        each pass of the prompt and after each token. If the answer is cancelled or the generator
        closed early, the transcript stays at the last whole turn, or with `keep_partial` gains the
        question and what was answered so far, if anything. On an error it stays as it was.

        Nothing happens, and nothing but options is checked, until the first event is asked for.
        Raises PromptError if the conversation does not fit the model's context (see `overflow`),
        or while another answer of this session is being read; ImageError or FetchError for a
        picture; FastVLMError for options that make no sense.
        """
        return self._answer(
            partial(self._question, text, listed(images)),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            profile=profile,
            cancelled=cancelled,
            keep_partial=keep_partial,
        )

    def retry(self, **options: Unpack[TurnOptions]) -> Events:
        """Answer the last question again; `stream` has the options. `collect` makes a whole of it.

        The earlier answer stays if this one fails, or is cancelled with nothing kept. Raises
        PromptError if nothing was asked yet.
        """
        return self._answer(
            lambda _clock, _cancelled: self._transcript.last_question, replace=True, **options
        )

    def edit(
        self,
        text: str,
        images: Sequence[Picture] | None = None,
        **options: Unpack[TurnOptions],
    ) -> Events:
        """Ask `text` in place of the last question, with its pictures or, if given, with others.

        As with `retry`, the earlier question and answer stay unless there is a new answer.
        """
        given = None if images is None else listed(images)

        def ask(clock: Clock, cancelled: Callable[[], bool]) -> Turn | None:
            pictures = self._transcript.last_question.images if given is None else given
            return self._question(text, pictures, clock, cancelled)

        return self._answer(ask, replace=True, **options)

    def prepare(
        self, images: Sequence[Picture], cancelled: Callable[[], bool] = lambda: False
    ) -> int:
        """Prefill what is known of the next question: the turns so far and its pictures.

        For the time a user takes to type. Returns how many positions were computed, 0 if the
        conversation is full; `cancelled` is asked before each picture and each pass. The transcript
        does not change; a question with other pictures is answered as if this had not been. Raises
        as `stream` does for a picture.
        """
        self._require_idle()
        clock = self._pipeline.start_clock(profile=False)
        question = self._question("", listed(images), clock, cancelled)
        if question is None:
            return 0
        processor = self._pipeline.processor
        whole = lay_out(processor, (*self._transcript.turns, question))
        if len(whole.positions) >= self.max_positions:
            return 0
        length = certain_length(processor, whole)
        return self._warm.prepare(whole, length, clock, cancelled)

    def _require_idle(self) -> None:
        if self._answering:
            raise PromptError("this conversation's last answer is still being read: close it first")

    def _answer(
        self,
        ask: _Ask,
        *,
        replace: bool = False,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        profile: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
        keep_partial: bool = False,
    ) -> Events:
        """Return the answer to what `ask` gives, in place of the last question if `replace`."""
        options = AnswerOptions(
            sampling=sampling or self.sampling,
            max_tokens=max_tokens,
            stop=stop,
            cancelled=cancelled,
        )
        return self._run(ask, replace, options, profile, keep_partial)

    def _run(
        self, ask: _Ask, replace: bool, options: AnswerOptions, profile: bool, keep_partial: bool
    ) -> Events:
        """Yield an answer; then it and its question are the transcript's end."""
        self._require_idle()
        past = self._transcript.before_last_question if replace else self._transcript
        text = ""
        fitted: Fitted | None = None
        self._answering = True
        try:
            clock = self._pipeline.start_clock(profile=profile)
            question = ask(clock, options.cancelled)
            if question is None:
                finished = self._pipeline.unanswered(clock)
            else:
                fitted = self._fitted((*past.turns, question), options.max_tokens)
                dropped = _dropped(past.turns, fitted)
                if dropped is not None:
                    yield dropped
                with closing(self._warm.answer(fitted, options, clock)) as events:
                    for event in events:
                        if isinstance(event, Finished):
                            finished = event
                        else:
                            text += event.text
                            yield event
        except GeneratorExit:
            if fitted is not None and keep_partial and text:
                self._commit(fitted, text)
            raise
        finally:
            self._answering = False
        if fitted is not None and (
            finished.finish_reason != "cancelled" or (keep_partial and text)
        ):
            self._commit(fitted, text)
        yield finished

    def _commit(self, fitted: Fitted, answer: str) -> None:
        self._transcript = Transcript((*fitted.turns, Turn(Message("assistant", (answer,)))))

    def _question(
        self,
        text: str,
        pictures: Sequence[Picture],
        clock: Clock,
        cancelled: Callable[[], bool],
    ) -> Turn | None:
        """Return a question, its new pictures dispatched to the tower; None if cancelled before."""
        shown: list[ShownImage] = []
        for picture in pictures:
            if cancelled():
                return None
            if isinstance(picture, StoredImage):  # encoded only if the KV cache lacks it
                shown.append(picture)
            else:
                shown.append(self._pipeline.encode(picture, ImageOptions(), clock))
        return Turn(user_message(text, len(shown)), tuple(shown))

    def _fitted(self, turns: Sequence[Turn], max_tokens: int) -> Fitted:
        return fit(
            self._pipeline.processor,
            turns,
            limit=self.max_positions,
            max_tokens=max_tokens,
            overflow=self.overflow,
        )


def _dropped(past: Sequence[Turn], fitted: Fitted) -> TurnsDropped | None:
    """Return what `fitted` leaves out of `past`, if anything."""
    count = len(past) + 1 - len(fitted.turns)
    if not count:
        return None
    return TurnsDropped(count // 2, sum(len(turn.images) for turn in past[1 : 1 + count]))


def collect(events: Events) -> Generation:
    """Run a stream to its end and return the whole answer."""
    text = ""
    ids: list[int] = []
    logprobs: list[float] = []
    dropped = 0
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            ids += event.token_ids
            logprobs += event.logprobs
        elif isinstance(event, TurnsDropped):
            dropped = event.turns
        else:
            return Generation(
                text, tuple(ids), event.finish_reason, event.stats, tuple(logprobs), dropped
            )
    raise RuntimeError("a generation ended without Finished")
