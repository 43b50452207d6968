"""What Mono-InternVL is: configuration, images, prompts, the network and its checkpoints."""


def register_auto_classes() -> None:
    """Teach transformers' Auto classes the `internvl_chat` checkpoints; may be called repeatedly.

    Importing `mono_internvl.model.modeling` or `mono_internvl.model.processing` does it already.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from mono_internvl.model.configuration import MonoInternVLConfig
    from mono_internvl.model.image_processing import MonoInternVLImageProcessor
    from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration, MonoInternVLModel
    from mono_internvl.model.processing import MonoInternVLProcessor

    AutoConfig.register(MonoInternVLConfig.model_type, MonoInternVLConfig, exist_ok=True)
    AutoModel.register(MonoInternVLConfig, MonoInternVLModel, exist_ok=True)
    AutoModelForImageTextToText.register(
        MonoInternVLConfig, MonoInternVLForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(MonoInternVLConfig, MonoInternVLProcessor, exist_ok=True)
    AutoImageProcessor.register(
        MonoInternVLConfig,
        image_processor_classes={"pil": MonoInternVLImageProcessor},
        exist_ok=True,
    )
