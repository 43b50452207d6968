"""Mono-InternVL: one decoder that reads pixels and words.

Public names are imported when they are first used: `import mono_internvl` alone loads neither torch
nor transformers. Transformers' Auto classes, pipelines and trainers know the checkpoints of this
package as soon as both are imported, in either order (`register`). The errors are in
`mono_internvl.errors`.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mono_internvl import transformers_import

if TYPE_CHECKING:
    from mono_internvl.auto_classes import register
    from mono_internvl.configuration.model import MonoInternVLConfig
    from mono_internvl.errors import MonoInternVLError
    from mono_internvl.generation.sampling import Sampling
    from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration, MonoInternVLModel
    from mono_internvl.processing.images import MonoInternVLImageProcessor
    from mono_internvl.processing.processor import MonoInternVLProcessor
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
    "MonoInternVLModel",
    "MonoInternVLProcessor",
    "Sampling",
    "__version__",
    "load",
    "register",
]

_HOME_OF_NAME = {
    "Answer": "serving.session",
    "ChatSession": "serving.session",
    "MonoInternVLConfig": "configuration.model",
    "MonoInternVLError": "errors",
    "MonoInternVLForConditionalGeneration": "model.modeling",
    "MonoInternVLImageProcessor": "processing.images",
    "MonoInternVLModel": "model.modeling",
    "MonoInternVLProcessor": "processing.processor",
    "Sampling": "generation.sampling",
    "load": "serving.loading",
    "register": "auto_classes",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("mono-internvl")
    elif name in _HOME_OF_NAME:
        home = _HOME_OF_NAME[name]
        value = getattr(import_module(f"{__name__}.{home}"), name)
        if home != "errors":  # transformers is loaded now
            import_module(f"{__name__}.auto_classes").register()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Transformers imports torchao where it is installed; at every start that would tell users of a CPU,
# in each process, which CUDA libraries it cannot load and what PyTorch will deprecate.
for _talkative in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_talkative).setLevel(logging.ERROR)

transformers_import.when_complete(
    "mono_internvl.auto_classes", "register", user="mono_internvl.model.modeling"
)
