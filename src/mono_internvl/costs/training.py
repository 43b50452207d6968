"""Operations that a training step owes, counted from a configuration without allocating it.

A product of rows and a weight is owed once forward, once more for the gradient of its rows if
anything before it learns, and once more for the gradient of the weight if that learns. Attention's
two products are owed over the positions that a query sees, and twice as much backward. The last
layer owes queries, output projection and feed-forward for labelled rows only, the head likewise.
Recomputation is nothing owed. Not counted: what `accounting` does not count, and the optimizer.

Source: two operations per multiplication and addition, as in `accounting`; a share of the peak rate
over such operations is what arXiv 2204.02311, appendix B, calls model FLOPs utilization.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.costs.inference import attention_windows, skeleton, tiles_of
from mono_internvl.errors import ConfigError


@dataclass(frozen=True)
class StepFlops:
    """Operations of forward and backward pass by part.

    Attributes:
        patch_embedding: Convolution of all tiles.
        linear: Projector, projections and experts of all layers, head.
        attention: Scores and weighted values of all layers, causal, no further than a window.
    """

    patch_embedding: int
    linear: int
    attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.patch_embedding + self.linear + self.attention


@dataclass(frozen=True)
class SampleShape:
    """Tokens of a training sample.

    Attributes:
        visual_tokens: A multiple of what one tile gives, or with learned tokens among them.
        text_tokens: Everything else.
        labelled_tokens: How many of the text tokens, the last ones, are to be predicted.
        tiles: That the visual tokens come from; they say it themselves where they are whole tiles.
    """

    visual_tokens: int
    text_tokens: int
    labelled_tokens: int
    tiles: int | None = None


def step_flops(
    config: MonoInternVLConfig, learned: Collection[str], sample: SampleShape
) -> StepFlops:
    """What one sample of a training step owes.

    Args:
        config: Of any size, without a vision tower; only its shapes are built.
        learned: Names of the parameters that learn.
        sample: Its tokens.

    Raises:
        ConfigError: The model has a vision tower, or the tokens do not fit together.
    """
    if config.vision_config.kind == "vit":
        raise ConfigError("vision_config.kind='vit'; operations of training are counted for patch")
    visual, text = sample.visual_tokens, sample.text_tokens
    tiles = tiles_of(config, visual) if sample.tiles is None else sample.tiles
    features = tiles * config.num_image_tokens_per_tile
    if not 0 < sample.labelled_tokens < text:
        raise ConfigError(f"{sample}; expected labels on some of the text tokens but the first")
    model = skeleton(config)
    count = _Counter(set(learned))
    patches = (config.force_image_size // config.vision_config.patch_size) ** 2
    embedding = model.model.vision_embedder
    count.group(
        "model.vision_embedder",
        {"patch_embedding": (embedding.patch_embedding, tiles * patches)},
    )
    patch_embedding, count.total = count.total, 0
    count.pass_by("model.vision_embedder", "model.projector.norm")
    for name, module in model.model.projector.named_modules():
        if isinstance(module, nn.Linear):
            count.group("model.projector", {name: (module, features)})
    count.pass_by("model.language_model.embed_tokens")
    layers, attention = model.model.language_model.layers, 0
    tokens, labelled = visual + text, sample.labelled_tokens
    text_config = config.text_config
    pair = 4 * text_config.num_attention_heads * text_config.head_dim
    windows = attention_windows(text_config, tokens)
    for number, layer in enumerate(layers):
        name = f"model.language_model.layers.{number}"
        is_last = number == len(layers) - 1
        read = (labelled, 0) if is_last else (text, visual)
        for norm, parts in _GROUPS:
            if norm is not None:
                count.pass_by(f"{name}.{norm}")
            modules: dict[str, tuple[nn.Module, int]] = {}
            for part in parts:
                rows = (text, visual) if part.endswith(("k_proj", "v_proj")) else read
                modules.update(_routed(layer, part, rows))
            count.group(name, modules)
            if "self_attn.q_proj" in parts:
                queries = range(tokens - 1 - labelled, tokens - 1) if is_last else range(tokens)
                passes = 3 if count.has_learned_before else 1
                seen = (min(place + 1, windows[number]) for place in queries)
                attention += passes * pair * sum(seen)
    count.pass_by("model.language_model.norm")
    tied = "model.language_model.embed_tokens" if text_config.tie_word_embeddings else "lm_head"
    count.group("", {tied: (model.lm_head, labelled)})
    return StepFlops(patch_embedding, count.total, attention)


_GROUPS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (None, ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    (None, ("mlp.down_proj",)),
)
"""Products of a layer that read the same rows, in order, each behind its norm if it has one."""


def _routed(layer: nn.Module, part: str, rows: tuple[int, int]) -> dict[str, tuple[nn.Module, int]]:
    """A product by name with its rows, (text, visual); with a visual copy, both."""
    owner, _, name = part.rpartition(".")
    copies = (f"{owner}_visual.{name}", f"{part}_visual")
    for copied in copies:
        try:
            visual = layer.get_submodule(copied)
        except AttributeError:
            continue
        return {part: (layer.get_submodule(part), rows[0]), copied: (visual, rows[1])}
    return {part: (layer.get_submodule(part), sum(rows))}


class _Counter:
    """Adds up products in the order of the forward pass."""

    def __init__(self, learned: set[str]) -> None:
        self.learned = learned
        self.total = 0
        self.has_learned_before = False

    def pass_by(self, *modules: str) -> None:
        """Modules without products, or their visual copies: what comes after owes them gradients
        if they learn."""
        prefixes = tuple(f"{name}{suffix}" for name in modules for suffix in (".", "_visual."))
        self.has_learned_before |= any(name.startswith(prefixes) for name in self.learned)

    def group(self, owner: str, modules: dict[str, tuple[nn.Module, int]]) -> None:
        """Products of the same rows: (module, rows) by name under `owner`."""
        before = self.has_learned_before
        for name, (module, rows) in modules.items():
            learns = f"{owner}.{name}.weight".removeprefix(".") in self.learned
            assert isinstance(module.weight, Tensor)
            self.total += 2 * module.weight.numel() * rows * (1 + before + learns)
            self.has_learned_before |= learns
