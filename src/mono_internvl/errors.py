"""Every error this package raises on purpose.

Each message names the field, what was found, what was expected and the next step. All classes
derive from `MonoInternVLError` and from the built-in that fits, so that callers may catch either.
"""


class MonoInternVLError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(MonoInternVLError, ValueError):
    """A configuration contradicts itself or names something this package does not implement."""


class CheckpointError(MonoInternVLError, ValueError):
    """A checkpoint folder is incomplete, of another architecture, or its tensors do not fit."""


class ImageError(MonoInternVLError, ValueError):
    """An image cannot be decoded, is empty, or is larger than the limit.

    Args:
        message: Which image, what was found, what was expected.
        reason: What is wrong in a word or two, alike for all images that are bad alike.
    """

    def __init__(self, message: str, reason: str = "image damaged") -> None:
        super().__init__(message)
        self.reason = reason


class PromptError(MonoInternVLError, ValueError):
    """A prompt and its images do not fit together, or text holds a reserved control token."""


class SampleError(MonoInternVLError, ValueError):
    """A training or evaluation record is malformed; the message starts with `file:line:`.

    Args:
        message: Which record, what was found, what was expected.
        reason: What is wrong in a word or two, alike for all records that are bad alike.
    """

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


class RecipeError(MonoInternVLError, ValueError):
    """A recipe is incomplete or contradicts the model it is applied to."""


class TrainingStateError(MonoInternVLError, RuntimeError):
    """A run directory cannot be resumed: it is damaged, in use, or belongs to another run."""


class EndpointError(MonoInternVLError, RuntimeError):
    """A model behind an address did not answer.

    Args:
        message: What it said last.
        scope: "request", which it will not answer however often it is asked; "endpoint", which
            answers nobody; "attempts", where it may answer another time.
    """

    def __init__(self, message: str, scope: str = "attempts") -> None:
        super().__init__(message)
        self.scope = scope


class ExpertsUnavailable(MonoInternVLError, RuntimeError):
    """An implementation of the experts was asked for by name and cannot run here."""


class MissingDependency(MonoInternVLError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""
