"""`mono-internvl init`: the checkpoint of a monolithic model from that of a language model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from mono_internvl.checkpoints.from_gguf import find_gguf, write_language_model
from mono_internvl.checkpoints.from_llm import MonolithicStart, monolithic_from_llm
from mono_internvl.configuration.checks import check_choice
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.configuration.options import TILINGS
from mono_internvl.errors import CheckpointError, ConfigError
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import (
    DEFAULT_SYSTEM_PROMPT,
    TURN_END,
    TURN_START,
    VISUAL_TOKENS,
)
from mono_internvl.processing.templates import (
    JINJA_FORM,
    RELEASED_FORM,
    TEMPLATE_DATE,
    adapt_template,
)
from mono_internvl.processing.tokenizer import TOKENIZER_CONFIG
from mono_internvl.released.weight_files import read_headers, resolve_checkpoint
from mono_internvl.runs.files import read_json
from mono_internvl.runs.folder import new_folder

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
VISUAL_TOKEN_PX = 2 * MonoInternVLVisionConfig.patch_size
_TILE_SETTINGS = {"internvl": (448, 12), "xcomposer_4khd": (336, 25)}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def init(
    llm: str,
    out: Path,
    *,
    visual_experts: tuple[str, ...] = ("ffn",),
    chat_template: str | None = None,
    template_date: str | None = None,
    tiling: str = "internvl",
    tile_px: int | None = None,
    patch_width: int = 1024,
    max_tiles: int | None = None,
    image_attention: str = "causal",
    visual_position_step: float = 1.0,
    visual_position_steps: tuple[float, ...] = (),
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
) -> Path:
    """Write the monolithic model that pre-training starts from.

    Text is answered as the language model answers it. Images mean nothing yet: the visual experts
    are copies of the text experts, patch embedding and projector are random.

    Args:
        llm: Folder, GGUF file or hub id of a language model of a known family.
        out: New folder.
        visual_experts: Which parts of each layer get a visual copy.
        chat_template: A Jinja file, or "internlm2-chat" for the form of the released checkpoints;
            None takes the language model's own template, and that form if it has none.
        template_date: What a template that prints today's date prints instead, YYYY-MM-DD; "today"
            leaves it the clock; None is `TEMPLATE_DATE`.
        tiling: How images are cut, of `TILINGS`.
        tile_px: Side of a tile, a multiple of 28; None: 448, or 336 as XComposer2-4KHD has it.
        patch_width: Of the patch embedding.
        max_tiles: Most tiles of an image, thumbnail or global view not counted; None: 12, or the HD
            limit of 25 that XComposer2-4KHD answers most benchmarks with.
        image_attention: How the tokens of an image see each other, of `IMAGE_ATTENTION`.
        visual_position_step: Distance between visual tokens in answers, in positions; a word is 1.
        visual_position_steps: Distances that training draws from, one an image (V2PE); none: the
            same as in answers.
        dtype: "auto" (as the language model is stored), or a name of `DTYPES`.
        seed: Of patch embedding and projector.
        revision: Branch, tag or commit of a hub id.

    Returns:
        `out`.

    Raises:
        ConfigError: The language model, its template or an option is not supported; named.
        CheckpointError: Files are missing, or `out` is there already or cannot be made.
    """
    if out.exists():
        raise CheckpointError(f"{out}: is there already; give a new folder, nothing is overwritten")
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={dtype!r}; expected auto, {', '.join(DTYPES)}")
    check_choice("tiling", tiling, TILINGS)
    default_px, default_tiles = _TILE_SETTINGS[tiling]
    tile_px = default_px if tile_px is None else tile_px
    if tile_px < VISUAL_TOKEN_PX or tile_px % VISUAL_TOKEN_PX:
        raise ConfigError(
            f"tile_px={tile_px}; expected a multiple of {VISUAL_TOKEN_PX}, the side of a visual "
            "token, for example 448"
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed}; expected 0 to 2**63 - 1")
    day = _day(template_date)
    vision = MonoInternVLVisionConfig(hidden_size=patch_width, image_size=tile_px)
    with new_folder(out) as partial, _language_model(llm, revision, partial) as folder:
        source = _template(folder, chat_template)
        template = None if source is None else adapt_template(source, day)
        made = monolithic_from_llm(
            folder,
            vision=vision,
            visual_experts=visual_experts,
            seed=seed,
            dtype=DTYPES[_stored_dtype(folder) if dtype == "auto" else dtype],
            more_tokens=() if template else (TURN_START, TURN_END),
            max_dynamic_patch=default_tiles if max_tiles is None else max_tiles,
            tiling=tiling,
            image_attention=image_attention,
            visual_position_step=visual_position_step,
            visual_position_steps=visual_position_steps,
            template=JINJA_FORM if template else RELEASED_FORM,
        )
        processor = _processor(made, folder, template)
        save_with_processor(made.model, processor, partial)
    return out


@contextmanager
def _language_model(llm: str, revision: str | None, scratch: Path) -> Iterator[Path]:
    """The folder of a language model; what a GGUF file holds lies in `scratch` meanwhile."""
    file = find_gguf(Path(llm))
    if file is None:
        yield resolve_checkpoint(llm, revision=revision)
        return
    with TemporaryDirectory(dir=scratch) as folder:
        write_language_model(file, Path(folder))
        yield Path(folder)


def save_with_processor(
    model: MonoInternVLForConditionalGeneration, processor: MonoInternVLProcessor, folder: Path
) -> None:
    """Write a checkpoint that every host can read, its stop ids in generation_config.json.

    Hosts that generate know no templates: without the id that closes an answer they go on to their
    limit.
    """
    generation: Any = model.generation_config
    generation.eos_token_id = processor.stop_token_ids
    generation.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _template(folder: Path, asked: str | None) -> str | None:
    """The Jinja template of the new model; None for the form of the released checkpoints."""
    if asked == RELEASED_FORM:
        return None
    if asked is not None:
        file = Path(asked)
        if not file.is_file():
            raise ConfigError(
                f"chat template {asked!r}: no such file; give a Jinja file or {RELEASED_FORM!r}"
            )
        return _read_template(file)
    file = folder / JINJA_FORM
    if file.is_file():
        return _read_template(file)
    settings = folder / TOKENIZER_CONFIG
    stored = read_json(settings if settings.is_file() else None).get("chat_template")
    if isinstance(stored, list):  # several by name
        named = {str(row.get("name")): row.get("template") for row in stored}
        stored = named.get("default")
        if stored is None:
            raise ConfigError(
                f"{folder}: chat templates {', '.join(named)} but no default one; give one of them "
                "as a file"
            )
    return str(stored) if stored else None


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: not a readable chat template ({error}); expected Jinja in UTF-8"
        ) from error


def _day(template_date: str | None) -> date | None:
    if template_date is None:
        return TEMPLATE_DATE
    try:
        return None if template_date == "today" else date.fromisoformat(template_date)
    except ValueError as error:
        raise ConfigError(
            f"template_date={template_date!r}: {error}; expected YYYY-MM-DD or today"
        ) from error


def _processor(made: MonolithicStart, folder: Path, template: str | None) -> MonoInternVLProcessor:
    tokenizer = made.tokenizer
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"{folder}: the tokenizer names no eos_token; add it to {TOKENIZER_CONFIG}"
            )
        tokenizer.pad_token = tokenizer.eos_token
    # In our own form BOS comes first where the language model's own tokenizer puts it there.
    if template is None and not _starts_with_bos(folder, tokenizer):
        tokenizer.bos_token = None
    is_internlm = made.model.config.text_config.family.startswith("internlm")
    return MonoInternVLProcessor.from_config(
        made.model.config,
        tokenizer,
        default_system_prompt=DEFAULT_SYSTEM_PROMPT if is_internlm and template is None else "",
        chat_template=template,
    )


def _starts_with_bos(folder: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    settings = folder / TOKENIZER_CONFIG
    asked = read_json(settings if settings.is_file() else None).get("add_bos_token")
    ids = tokenizer("a").input_ids
    return bool(asked) or (tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)


def _stored_dtype(folder: Path) -> str:
    kinds = Counter(info.dtype for info in read_headers(folder).values())
    kind = kinds.most_common(1)[0][0]
    if kind not in _STORED:
        raise ConfigError(
            f"{folder}: weights in {kind}; expected {', '.join(_STORED)}, or say dtype (quantised "
            "weights cannot be read)"
        )
    return _STORED[kind]


def summary(folder: Path) -> dict[str, Any]:
    """What was made, for the screen: family, sizes, prompt form."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    llm = config["llm_config"]
    return {
        "family": llm["model_type"],
        "layers": llm["num_hidden_layers"],
        "width": llm["hidden_size"],
        "vocabulary": llm["vocab_size"],
        "new_visual_tokens": len(VISUAL_TOKENS),
        "visual_experts": config["visual_experts"],
        "prompt_form": config["template"],
    }
