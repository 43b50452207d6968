"""What a released config.json says about itself, and what it means where it leaves a key out.

Source: OpenGVLab/Mono-InternVL at 5b17ab4, defaults of its configuration classes.
"""

from typing import Any

RELEASED_MODEL_TYPE = "internvl_chat"
RELEASED_ARCHITECTURE = "InternVLChatModel"

# What the released code assumes where a file leaves a key out.
RELEASED_LLM_DEFAULTS: dict[str, Any] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "bias": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
RELEASED_TOP_DEFAULTS: dict[str, Any] = {
    "select_layer": -4,
    "ps_version": "v1",
    "downsample_ratio": 0.5,
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}
