"""Errors of hf_osd; each is also the builtin error that a caller would expect, so `except ValueError` works."""

# Words in the message of a plain RuntimeError: torch has a class of its own for accelerators alone.
_OUT_OF_MEMORY = ("out of memory", "allocate memory")


class HfOsdError(Exception):
    """Base class of every error that hf_osd raises on purpose."""


class ConfigError(HfOsdError, ValueError):
    """A setting is out of its range or contradicts another one."""


class InputError(HfOsdError, ValueError):
    """The inputs of `generate` cannot be decoded: wrong shape, wrong device, nothing to do."""


class ModelTypeError(InputError, TypeError):
    """Something was passed in the place of a model that is none."""


class UnsupportedError(HfOsdError, ValueError):
    """
    Speculation cannot serve this losslessly. Where plain `generate` can, the request is served by it instead, and this
    error is raised only with `OnlineConfig(unsupported="error")`.

    Args:
        message (`str`): What cannot be served, and what to do about it.
        cause (`str`, *optional*): A short name of the reason, the same for every request of its kind. Defaults to the
            message.

    Attributes:
        cause (`str`): As given.
    """

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause or message


class UnsupportedGenerationError(UnsupportedError):
    """`generate` was asked for a mode that has no lossless speculative form here, such as beam search."""


class UnsupportedModelError(UnsupportedError):
    """A target or draft cannot be served: its cache cannot roll back, its vocabulary differs, it has no weights."""


class PromptSourceError(HfOsdError, ValueError):
    """A file or data set of prompts cannot be read as one."""


class MissingDependencyError(HfOsdError, ImportError):
    """An optional package is needed and not installed; the message says which extra brings it."""


class ClosedError(HfOsdError, RuntimeError):
    """An `OnlineAssistant` was used after `close()`."""


class LearningError(HfOsdError, RuntimeError):
    """An update that the user asked for explicitly failed; serving is not affected."""


class StateError(HfOsdError, OSError):
    """A state directory cannot be used: it is a file, not writable, in use, or of another format."""


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise `InputError` for an optional argument that is given, and not of a kind."""
    if value is not None and not isinstance(value, kind):
        got = f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InputError(f"{name} must be {article} {kind.__name__}, got {got}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the machine's: a lack of memory, which says nothing of the model that was tried."""
    is_torchs = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return is_torchs or isinstance(error, MemoryError)
