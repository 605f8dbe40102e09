"""The file a conversation is kept in: when it is written, and whether it holds what was said.

Knows what is waiting to be written, and nothing of what a session is.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.terminal.live_session import LiveSession, OtherConversation
from fastvlm_mlx.terminal.model_thread import ModelThread
from fastvlm_mlx.terminal.news import News


class KeptFile:
    """`path` is where /save writes without a name. A file given at the start is written after each
    change, in the model's thread, without being waited for.

    `by_itself` is whether it is. `unsaved` is whether there are changes that no file holds,
    `refused` whether that is because another program has changed the file. `given_up` is the
    command, with its file, that gives up a conversation once it was said that it does.
    """

    def __init__(
        self, path: Path | None, model: ModelThread, live: LiveSession, news: News
    ) -> None:
        self.path = path
        self.unsaved = False
        self.refused = False
        self.given_up: tuple[str, Path | None] | None = None
        self.by_itself = path is not None
        self._model, self._live, self._news = model, live, news
        self._last: Future[None] | None = None
        self._said = ""

    @property
    def saving(self) -> bool:
        """Whether a save is waiting or under way."""
        return self._last is not None and not self._last.done()

    def hear_change(self) -> None:
        """Hear that the conversation is not what it was."""
        self.unsaved, self.given_up = True, None
        if self.by_itself:
            self._save()

    def hear_written(self, path: Path) -> None:
        """Hear that the user had it written to `path`."""
        self.unsaved = False
        if not self.by_itself or self.refused:
            self.path, self.refused, self._said = path, False, ""

    def hear_read(self, path: Path) -> None:
        """Hear that the conversation is now the one in `path`, which is kept from now on."""
        self.path, self.unsaved, self.given_up = path, False, None
        self.refused, self._said = False, ""

    def save_rest(self) -> None:
        """Try again to write what could not be written."""
        if self.by_itself and self.unsaved and not self.saving:
            self._save()

    def _save(self) -> None:
        path = self.path
        assert path is not None
        self._last = self._model.call(lambda engine: self._live.save(engine, path))
        self._last.add_done_callback(self._hear_saved)

    def _hear_saved(self, saved: Future[None]) -> None:
        error = saved.exception()
        self.unsaved = error is not None
        self.refused = isinstance(error, OtherConversation)
        if error is None:
            self._said = ""
        elif not isinstance(error, FastVLMError):
            self._news.bug = error
        elif str(error) != self._said:
            self._said = str(error)
            what = "" if self.refused else "the conversation was not saved: "
            self._news.say(f"{what}{error}")
