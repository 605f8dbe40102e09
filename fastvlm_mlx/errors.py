"""Every error a user can cause: one line saying what is wrong and what to do about it.

Knows nothing of where it is raised. The CLI prints `str(error)` and exits 2; a server answers 4xx.
"""


def one_line(text: str) -> str:
    """Return text fit for one line of a terminal; what is not printable becomes "?"."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


class FastVLMError(Exception):
    """Base of all errors whose message is meant for the user, as one line."""


class BackendError(FastVLMError):
    """MLX is missing, installed twice, or lacks the device asked for."""


class CheckpointError(FastVLMError):
    """A checkpoint folder or file cannot be read: missing, truncated, corrupt, unsafe."""


class CheckpointMismatch(CheckpointError):
    """Tensors do not fit the recognised layout: unmapped, missing or mis-shaped keys."""


class ConfigError(FastVLMError):
    """A config.json holds an unknown, missing or contradictory value."""


class ImageError(FastVLMError):
    """A picture cannot be opened, decoded or fetched."""


class PromptError(FastVLMError):
    """Messages and pictures do not fit together, or the prompt does not fit the context."""


class ContextFull(PromptError):
    """The prompt does not fit the model's context."""


class FetchError(FastVLMError):
    """A download failed, was refused, or the network is off."""


class MemoryLimitError(FastVLMError):
    """The model needs more memory than is free or allowed."""


class SessionError(FastVLMError):
    """A session file cannot be read or written."""
