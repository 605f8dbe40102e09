"""The model's side of a chat: the session and its pictures, touched in the model's thread only.

Every public method takes the engine and is given to `ModelThread`; what it returns is text and
numbers, as `Facts`. Knows no terminal and no commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import ContextFull, PromptError, SessionError, one_line
from fastvlm_mlx.events import ChatEvent, TextDelta, TurnsDropped
from fastvlm_mlx.terminal.answers import Hold, NamedDrop, Request
from fastvlm_mlx.terminal.attached import Attached, PictureForm
from fastvlm_mlx.terminal.seen_files import SeenFiles, keep_beside, require_session
from fastvlm_mlx.terminal.settings import Settings
from fastvlm_mlx.terminal.status import SessionFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastvlm_mlx.engine import EncodedImage, Engine
    from fastvlm_mlx.generate.session import ChatSession, TurnOptions

# Pictures encoded for a question that was not asked after all: the cache of features, bounded in
# bytes, still has them when they leave here.
_MOST_ENCODED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How a conversation begins: a session file to go on with, or else a new one.

    `system` None is the file's, or the default one.
    """

    system: str | None = None
    kv_bits: int | None = None
    file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What there is to say of a session. `pictures` are (name, positions) in transcript order.

    `positions_per_picture` is what a new picture will take.
    """

    precision: str
    system: str
    last_question: str | None
    pictures: tuple[tuple[str, int], ...]
    positions_per_picture: int
    session: SessionFacts


class Forgotten(Exception):
    """Thrown into an answer that nobody saw anything of: it leaves no trace in the transcript."""


class OtherConversation(SessionError):
    """A file holds what this chat has neither read nor written; it is not written over."""


class LiveSession:
    """A ChatSession where it lives. `publish` hears the facts after each change, and `say` lines
    for the user, in this thread."""

    def __init__(
        self,
        opening: Opening,
        form: PictureForm,
        publish: Callable[[Facts], None],
        say: Callable[[str], None],
    ) -> None:
        self._opening = opening
        self._form = form
        self._publish = publish
        self._say = say
        self._seen = SeenFiles()
        self._session: ChatSession | None = None
        self._encoded: dict[int, EncodedImage] = {}
        self._damaged: Path | None = None
        self._warm_up_ms: float | None = None

    def open(self, engine: Engine, settings: Settings) -> list[str]:
        """Begin or resume; return what is to be said of the file.

        Raises FastVLMError for a file that cannot be used at all; it is left untouched.
        """
        file = self._opening.file
        lines: list[str] = []
        if file is not None and file.exists():
            lines = self.load(engine, file, settings)
            if self._opening.system is not None:
                self.session.set_system(self._opening.system)
        else:
            self._session = self._new(engine, settings)
        self._tell(engine)
        return lines

    def load(self, engine: Engine, file: Path, settings: Settings) -> list[str]:
        """Go on with the conversation in a file; return what is to be said of it.

        On an error, the conversation so far stays.
        """
        lines: list[str] = []
        self._seen.note(file)  # before: what is written while it is read is another's
        self._session = engine.resume(
            file,
            sampling=settings.sampling,
            overflow=settings.overflow,
            kv_bits=self._opening.kv_bits,
            say=lines.append,
        )
        self._damaged = file if self._session.damage else None
        self._tell(engine)
        return lines

    def clear(self, engine: Engine, settings: Settings) -> None:
        """Begin again with the same system message; encoded pictures stay in the engine's cache."""
        system = self.session.system
        self._session = self._new(engine, settings)
        self.session.set_system(system)
        self._tell(engine)

    def warm_up(self, engine: Engine) -> None:
        """Pay for the first run of everything while the user types."""
        self._warm_up_ms = engine.warm_up(kv_bits=self.session.kv_bits)
        self._tell(engine)

    def encode(self, engine: Engine, picture: Attached) -> int:
        """Encode a picture of the next question; return its positions."""
        return self._encode(engine, picture).positions

    def prepare(self, engine: Engine, pictures: Sequence[Attached], hold: Hold) -> None:
        """Prefill the pictures of the next question, as far as `hold` lets it."""
        encoded = [self._encode(engine, picture) for picture in pictures]
        self.session.prepare(encoded, cancelled=hold.cancelled)

    def answer(self, engine: Engine, request: Request, hold: Hold) -> Iterator[ChatEvent]:
        """Yield the answer; `hold` decides what becomes of one that is stopped."""
        session = self.session
        session.overflow = request.settings.overflow
        session.sampling = request.settings.sampling
        names = tuple(image.name for image in session.images)
        try:
            images = [self._encode(engine, picture) for picture in request.pictures]
            how: TurnOptions = {
                "max_tokens": request.settings.max_tokens,
                "cancelled": hold.cancelled,
                "keep_partial": True,
            }
            if request.kind == "ask":
                events = session.stream(request.text, images, **how)
            elif request.kind == "retry":
                events = session.retry(**how)
            else:
                events = session.edit(request.text, [*session.last_images, *images], **how)
            try:
                for event in events:
                    if isinstance(event, TextDelta) and not hold.claim():
                        events.throw(Forgotten())
                    if isinstance(event, TurnsDropped):
                        event = NamedDrop(event.turns, event.images, names[: event.images])
                    yield event
            except Forgotten:
                return
            except ContextFull as error:
                if not session.turn_count or session.overflow == "drop":
                    raise  # the question alone is too long
                raise ContextFull(f"{error} (/undo, /drop N or /set overflow drop)") from error
            finally:
                events.close()
            for picture in request.pictures:
                self._encoded.pop(picture.key, None)
        finally:
            self._tell(engine)

    def rewind(self, engine: Engine, turns: int) -> None:
        """Forget the last turns. Raises PromptError if there are fewer."""
        self.session.rewind(turns)
        self._tell(engine)

    def drop_image(self, engine: Engine, index: int) -> None:
        """Take a picture out of the transcript. Raises PromptError if there is none."""
        self.session.drop_image(index)
        self._tell(engine)

    def set_system(self, engine: Engine, text: str) -> None:
        """Replace the system message."""
        self.session.set_system(text)
        self._tell(engine)

    def save(self, _engine: Engine, file: Path, *, replace: bool = False) -> None:
        """Write the session; a file that was read as damaged is first kept as FILE.damaged.

        Raises OtherConversation if the file is a session that another program wrote, or changed,
        since this chat read or wrote it; not with `replace`.
        """
        if not replace and self._seen.is_others(file):
            require_session(file)
            raise OtherConversation(
                f"{one_line(str(file))} was changed by another program: this conversation is not "
                "saved to it; /save another file"
            )
        if self._damaged is not None and self._damaged == file:
            self._say(f"kept as {one_line(keep_beside(file).name)}")
            self._damaged = None
        self.session.save(file)
        self._seen.note(file)

    @property
    def session(self) -> ChatSession:
        """The session; it is opened before anything else is done."""
        if self._session is None:
            raise PromptError("the conversation could not be opened")
        return self._session

    def _new(self, engine: Engine, settings: Settings) -> ChatSession:
        opening = self._opening
        session = engine.chat(
            sampling=settings.sampling, overflow=settings.overflow, kv_bits=opening.kv_bits
        )
        if opening.system is not None:
            session.set_system(opening.system)
        return session

    def _encode(self, engine: Engine, picture: Attached) -> EncodedImage:
        encoded = self._encoded.get(picture.key)
        if encoded is None:
            encoded = engine.encode(
                picture.data,
                resolution=self._form.resolution,
                image_mode=self._form.image_mode,
                background=self._form.background,
                name=picture.name,
            )
            while len(self._encoded) >= _MOST_ENCODED:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[picture.key] = encoded
        return encoded

    def _tell(self, engine: Engine) -> None:
        session = self._session
        if session is None:
            return
        import mlx.core as mx

        vision = engine.config.vision
        side = self._form.resolution or vision.image_size
        features = engine.image_features
        facts = SessionFacts(
            turns=session.turn_count,
            images=len(session.images),
            positions=session.positions,
            max_positions=session.max_positions,
            kv_bytes=session.kv_bytes,
            features_bytes=features.nbytes,
            max_features_bytes=features.max_bytes,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            warm_up_ms=self._warm_up_ms,
        )
        self._publish(
            Facts(
                precision=_precision(engine),
                system=session.system,
                last_question=session.last_question,
                pictures=tuple((i.name, i.positions) for i in session.images),
                positions_per_picture=vision.tokens(side, side),
                session=facts,
            )
        )


def _precision(engine: Engine) -> str:
    """Return "4 bit" if the decoder's matrices are packed, else the dtype's name."""
    modules = engine.pipeline.model.decoder.modules()
    bits = next((module.bits for module in modules if hasattr(module, "bits")), None)
    return str(engine.dtype).removeprefix("mlx.core.") if bits is None else f"{bits} bit"
