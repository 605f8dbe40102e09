"""A conversation to and from what a session file holds.

Knows when a saved KV cache is this model's: the same weights, sizes and packing. If it is not, the
transcript and the pictures still are the conversation, and their KV is computed with the next
answer; what is lost is said. Knows no bytes of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastvlm_mlx.errors import SessionError
from fastvlm_mlx.generate.cache import KVPrefix
from fastvlm_mlx.generate.context import lay_out
from fastvlm_mlx.generate.pipeline import Pipeline
from fastvlm_mlx.generate.saved_kv import SavedKV
from fastvlm_mlx.generate.session_file import SavedImage, SavedSession
from fastvlm_mlx.generate.transcript import Transcript, Turn, without_slot
from fastvlm_mlx.model.fastvlm import StoredImage
from fastvlm_mlx.prompt.template import ImageMark, Message

# Stands for the position after a transcript, which is like none in it.
_AFTER = -1


def to_saved(pipeline: Pipeline, transcript: Transcript, kv: KVPrefix) -> SavedSession:
    """Return what is to be written of a conversation, and nothing of what was taken back.

    Raises SessionError for a picture that was given as features, without its pixels.
    """
    for number, image in enumerate(transcript.images, start=1):
        if image.pixels is None:
            raise SessionError(
                f"picture {number} was given as features, without pixels: it can't be saved"
            )
    said = lay_out(pipeline.processor, transcript.turns, generation_prompt=False).positions
    length = kv.common([*said, _AFTER])
    return SavedSession(
        messages=transcript.messages,
        images=tuple(SavedImage(i.digest, i.name, i.pixels) for i in transcript.images),
        model=pipeline.name,
        kv=SavedKV(
            fingerprint=pipeline.fingerprint,
            bits=kv.kv_bits,
            group_size=kv.group_size,
            positions=kv.positions[:length],
            layers=tuple(kv.export(length)),
        ),
    )


def transcript_of(pipeline: Pipeline, saved: SavedSession) -> Transcript:
    """Return the transcript of a saved conversation, without the pictures that were lost.

    Raises ConfigError for a picture of a size that is not on this model's grid.
    """
    images = iter(saved.images)
    return Transcript(tuple(_turn(pipeline, message, images) for message in saved.messages))


def _turn(pipeline: Pipeline, message: Message, images: Iterator[SavedImage]) -> Turn:
    given = [next(images) for part in message.content if isinstance(part, ImageMark)]
    shown: list[StoredImage] = []
    for image in given:
        if image.pixels is None:
            message = without_slot(message, len(shown))
        else:
            positions = pipeline.model.config.vision.tokens(*image.pixels.shape[:2])
            shown.append(StoredImage(image.pixels, image.digest, image.name, positions))
    return Turn(message, tuple(shown))


def kv_of(
    pipeline: Pipeline, saved: SavedSession, kv_bits: int | None, say: Callable[[str], None]
) -> KVPrefix:
    """Return the saved KV cache if it is this model's, otherwise an empty one, and say why.

    `kv_bits` None takes the bits it was saved with.
    """
    kv = saved.kv
    bits = kv.bits if kv_bits is None and kv is not None else kv_bits
    empty = KVPrefix(pipeline.model.decoder, bits)
    if kv is None:
        return empty
    if kv.bits != bits:
        say(f"the saved KV cache has {_bits(kv.bits)}, not {_bits(bits)}: it is computed again")
        return empty
    if kv.fingerprint != pipeline.fingerprint:
        whose = f" ({saved.model})" if saved.model and saved.model != pipeline.name else ""
        say(
            f"the conversation was saved with another model or precision{whose}: "
            "its KV cache is computed again"
        )
        return empty
    try:
        return empty.restore(kv.layers, kv.positions)
    except ValueError as error:
        say(f"the saved KV cache does not fit this model ({error}): it is computed again")
        return empty


def _bits(bits: int | None) -> str:
    return "floats" if bits is None else f"{bits} bits"
