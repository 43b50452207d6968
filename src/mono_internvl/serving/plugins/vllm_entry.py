"""What vLLM calls in each of its processes (`vllm.general_plugins`): names, and nothing heavy."""

import logging

ARCHITECTURE = "MonoInternVLForConditionalGeneration"
_CLASS = "mono_internvl.serving.plugins.vllm_model:MonoInternVLForVllm"


def register() -> None:
    """Teach vLLM our checkpoints; other InternVL repositories stay vLLM's.

    A vLLM that lacks what is needed goes on without us, with a warning.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        import mono_internvl
        from mono_internvl.serving.plugins.vllm_limits import Limits
    except ImportError as error:
        logging.getLogger(__name__).warning("vLLM does not get to know Mono-InternVL: %s", error)
        return
    mono_internvl.register()
    ModelRegistry.register_model(ARCHITECTURE, _CLASS)
    MODELS_CONFIG_MAP[ARCHITECTURE] = Limits
