"""How transformers' Auto classes, pipelines and servers find this package's classes.

On disk a checkpoint says `model_type: internvl_chat`, as the released ones do. That name belongs to
a whole family of repositories with code of their own, so in memory our configuration has a name of
its own, and `internvl_chat` only leads to it: where somebody loads a repository with
`trust_remote_code=True`, its code runs as if this package were not there.
"""

from __future__ import annotations

from typing import Any

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.configuration.released_fields import RELEASED_MODEL_TYPE


class ReleasedConfig(MonoInternVLConfig):
    """What `internvl_chat` in a config.json means to `AutoConfig`: a `MonoInternVLConfig`."""

    model_type = RELEASED_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `MonoInternVLConfig`; there are no instances of this class."""
        return MonoInternVLConfig.from_dict(config_dict, **kwargs)


# transformers runs the code of a trusted repository only where the class registered for its
# model_type is one of transformers' own, told by this name. Any other name would take every
# InternVL repository away from its code.
ReleasedConfig.__module__ = f"transformers.{ReleasedConfig.__module__}"


def register() -> None:
    """Teach transformers the checkpoints of this package; may be called repeatedly.

    Auto classes, pipelines, `transformers serve` and trainers that are given a path then find the
    model and its processor. It happens by itself: with the first public name that is used, with the
    network, and when transformers is imported after `import mono_internvl`.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration, MonoInternVLModel
    from mono_internvl.processing.images import MonoInternVLImageProcessor
    from mono_internvl.processing.processor import MonoInternVLProcessor

    own_name = MonoInternVLConfig.model_type
    AutoConfig.register(own_name, MonoInternVLConfig, exist_ok=True)
    if RELEASED_MODEL_TYPE not in CONFIG_MAPPING:  # else somebody else's class: theirs stays
        AutoConfig.register(RELEASED_MODEL_TYPE, ReleasedConfig)
    AutoModel.register(MonoInternVLConfig, MonoInternVLModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        auto_class.register(MonoInternVLConfig, MonoInternVLForConditionalGeneration, exist_ok=True)
    # Pipelines and `transformers serve` ask these tables of names what a model can do.
    for names in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        names[own_name] = MonoInternVLForConditionalGeneration.__name__
    AutoProcessor.register(MonoInternVLConfig, MonoInternVLProcessor, exist_ok=True)
    AutoImageProcessor.register(
        MonoInternVLConfig,
        image_processor_classes={"pil": MonoInternVLImageProcessor},
        exist_ok=True,
    )
