"""Text to token ids and back, the ids that end an answer, and text as it streams in.

Refuses to know turns, pictures and models; `tokenizer_files` knows the files. What a user typed
never becomes an added token: `encode` takes plain text, `control_id` the template's tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from fastvlm_mlx.errors import CheckpointError, PromptError
from fastvlm_mlx.prompt.tokenizer_files import read_stop_ids, read_tokenizer


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE's alphabet (GPT-2): printable Latin-1 is itself, the rest moved to U+0100…"""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + i): byte for i, byte in enumerate(moved)
    }


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """A byte-level BPE tokenizer. Safe to share between threads.

    `stop_ids` are the end-of-sequence ids of the tokenizer's files and generation_config.json,
    with `<|im_end|>` and `<|endoftext|>` where they exist; config.json's are the engine's to add.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stop_ids: frozenset[int]) -> None:
        self._added = backend.get_added_tokens_decoder()
        # Non-special added tokens (Qwen2.5's <tool_call>, an odd <image>) would still be found in
        # a user's text; as special ones `encode_special_tokens` leaves them text.
        loose = [token for token in self._added.values() if not token.special]
        backend.add_special_tokens([tokenizers.AddedToken(t.content, special=True) for t in loose])
        backend.encode_special_tokens = True
        backend.no_truncation()  # tokenizer.json may carry both from its training
        backend.no_padding()
        self._backend = backend
        self._bytes: dict[int, bytes] = {
            i: b"" if token.special else token.content.encode() for i, token in self._added.items()
        }
        self.stop_ids = stop_ids
        self.vocab_size = max(backend.get_vocab_size(), *(i + 1 for i in self._added), 0)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json and merges.txt, and the added tokens beside them.

        Raises CheckpointError, naming the file, if one is missing or not what it should be.
        """
        backend = read_tokenizer(folder)
        return cls(backend, read_stop_ids(backend, folder))

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; `<|im_end|>` or `<image>` typed in it stay text.

        Raises PromptError for text that is not Unicode (a broken byte from the command line).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the text holds bytes that are not valid UTF-8") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def control_id(self, token: str) -> int:
        """Return the id of a control token. Raises CheckpointError if the vocabulary has none."""
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no {token}: it is not FastVLM's")
        return token_id

    def token(self, token_id: int) -> str | None:
        """Return a token as its vocabulary spells it, `<|im_end|>` say; None if there is none."""
        in_range = 0 <= token_id < self.vocab_size
        found: str | None = self._backend.id_to_token(token_id) if in_range else None
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token, perhaps part of a character.

        A special token and an id beyond the vocabulary (embedding tables are padded) are empty.
        """
        known = self._bytes.get(token_id)
        if known is None:
            text = self.token(token_id)
            known = self._bytes[token_id] = b"" if text is None else _bytes_of(text)
        return known

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, special tokens left out, broken UTF-8 as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


class TextStream:
    """Text of an answer as its tokens arrive: whole characters, nothing from a stop string on.

    The answer ends before the stop string that is complete first, character by character (the
    longest, if several end there), so how the text is cut into tokens never matters. Work for a
    token is proportional to its own text.

    `skip_ids` add no text. `stopped` turns true at a stop string; after that all text is dropped.
    Raises PromptError for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        skip_ids: frozenset[int] = frozenset(),
    ) -> None:
        if not all(stop_strings):
            raise PromptError("a stop string must not be empty")
        self._tokenizer = tokenizer
        self._skip_ids = skip_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(stop) for stop in stop_strings]
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, often the token's, perhaps none."""
        if token_id in self._skip_ids:
            return ""
        return self._feed(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        text = self._feed(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _feed(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        for end, char in enumerate(new, start=len(self._held) + 1):
            lengths = [len(m.stop) for m in self._matchers if m.step(char)]
            if lengths:
                self.stopped = True
                self._held = ""
                return text[: end - max(lengths)]
        certain = len(text) - max((matcher.matched for matcher in self._matchers), default=0)
        self._held = text[certain:]
        return text[:certain]


class _Matcher:
    """Knuth-Morris-Pratt: how much of a stop string the text seen so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = [0] * len(stop)  # for each prefix its longest border
        for i in range(1, len(stop)):
            k = self._fallback[i - 1]
            while k and stop[i] != stop[k]:
                k = self._fallback[k - 1]
            self._fallback[i] = k + (stop[i] == stop[k])

    def step(self, char: str) -> bool:
        """Take one character; return whether it completes the stop string."""
        while self.matched and char != self.stop[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += char == self.stop[self.matched]
        return self.matched == len(self.stop)


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # not in the byte alphabet, so it stands for itself
        return token.encode()
