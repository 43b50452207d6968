"""Mono-InternVL: one decoder that reads pixels and words.

Public names are imported when they are first used: `import mono_internvl` alone loads neither torch
nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mono_internvl.errors import MonoInternVLError
    from mono_internvl.model.configuration import MonoInternVLConfig
    from mono_internvl.model.image_processing import MonoInternVLImageProcessor
    from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
    from mono_internvl.model.processing import MonoInternVLProcessor
    from mono_internvl.serving.loading import load
    from mono_internvl.serving.session import Answer, ChatSession

    __version__: str

__all__ = [
    "Answer",
    "ChatSession",
    "MonoInternVLConfig",
    "MonoInternVLError",
    "MonoInternVLForConditionalGeneration",
    "MonoInternVLImageProcessor",
    "MonoInternVLProcessor",
    "__version__",
    "load",
]

_HOME_OF_NAME = {
    "Answer": "serving.session",
    "ChatSession": "serving.session",
    "MonoInternVLConfig": "model.configuration",
    "MonoInternVLError": "errors",
    "MonoInternVLForConditionalGeneration": "model.modeling",
    "MonoInternVLImageProcessor": "model.image_processing",
    "MonoInternVLProcessor": "model.processing",
    "load": "serving.loading",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("mono-internvl")
    elif name in _HOME_OF_NAME:
        value = getattr(import_module(f"{__name__}.{_HOME_OF_NAME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
