"""What vLLM cannot do with a checkpoint is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from mono_internvl.attention.image_layout import has_image_layout
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import ConfigError


class Limits(VerifyAndUpdateConfig):  # type: ignore[misc]
    """Looks at vLLM's configuration, and mends what can be mended."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Let the model run eagerly: each step says on the host which rows are visual.

        Raises:
            ConfigError: The model would answer otherwise than here.
        """
        own, parallel = vllm_config.model_config, vllm_config.parallel_config
        own.enforce_eager = True
        config: MonoInternVLConfig = own.hf_config
        text = config.text_config
        for name, is_fine in (
            ("image_attention, visual_position_step", not has_image_layout(config)),
            ("tiling", config.tiling == "internvl"),
            ("sliding_layers", not any(text.sliding_layers or ())),
            ("tensor_parallel_size", parallel.tensor_parallel_size == 1),
            ("pipeline_parallel_size", parallel.pipeline_parallel_size == 1),
        ):
            if not is_fine:
                raise ConfigError(
                    f"{name}: vLLM does not do this with Mono-InternVL; "
                    "use `mono-internvl serve`, or 1 and the released form of images"
                )
        most = text.max_position_embeddings
        if text.rope_parameters["rope_type"] == "dynamic" and own.max_model_len > most:
            if own.original_max_model_len is not None:
                raise ConfigError(
                    f"max_model_len={own.max_model_len}: beyond {most} tokens the angles of this "
                    f"checkpoint depend on the length of each prompt; give {most} or less"
                )
            own.max_model_len = vllm_config.scheduler_config.max_model_len = most
