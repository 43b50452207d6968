"""The miniature's language model: tokenizer, training, and its export as a plain Llama checkpoint.

`mono-internvl quickstart --llm scratch` calls this. The shipped model is what it makes with seed 0,
without the stages of vision:

    python -m mono_internvl.miniature.language_model runs/language --processes 2

leaves it in `runs/language/llm`; a copy of that folder is `miniature/assets/language_model`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mono_internvl.checkpoints.from_llm import export_llama, monolithic_from_llm
from mono_internvl.checkpoints.initialize import save_with_processor
from mono_internvl.compute import ComputePlan, make_plan
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.distributed import run_processes
from mono_internvl.miniature import FULL, WorldFiles, write_world
from mono_internvl.miniature.english import load_english
from mono_internvl.miniature.recipes import LANGUAGE, LANGUAGE_MODEL, VISION
from mono_internvl.miniature.records import Record, texts_of
from mono_internvl.miniature.tokenizer import train_tokenizer
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.tokenizer import load_tokenizer
from mono_internvl.runs.json_lines import read_lines
from mono_internvl.training.recipe import Recipe
from mono_internvl.training.run import train_stages

logger = logging.getLogger(__name__)


def make_language_model(
    world: WorldFiles,
    run: Path,
    *,
    recipe: Recipe = LANGUAGE,
    compute: ComputePlan | None = None,
) -> Path:
    """Train the small language model from nothing.

    The decoder of this package learns it, with every visual part frozen and unused.

    Args:
        world: Files of the miniature's world.
        run: Output folder; `run/llm` is the result.
        recipe: How it is trained.
        compute: What to train with; made here unless given.

    Returns:
        Folder of a plain Llama checkpoint with its tokenizer.
    """
    start, out = run / "random", run / "llm"
    if not start.exists():
        _random_start(world, run, start)
    compute = compute or make_plan("cpu", batch_size=recipe.stages[0].batch_size)
    arguments = (recipe, start, world.root, run, compute)
    run_processes(train_stages, compute.processes, *arguments, threads=compute.threads)
    model = MonoInternVLForConditionalGeneration.from_pretrained(
        run / recipe.stages[-1].name / "checkpoint"
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "random-llama")
    _drop_visual_rows(model, len(tokenizer))
    export_llama(model.to(torch.bfloat16), tokenizer, out)
    return out


def _random_start(world: WorldFiles, run: Path, start: Path) -> None:
    """A randomly initialised Llama checkpoint, and the same as an unseeing model of ours."""
    records = []
    meta = json.loads(world.language.read_text())
    for entry in meta.values():
        lines = read_lines(world.root / entry["annotation"])
        records += [json.loads(line) for line in lines]
    tokenizer = tokenizer_of(records)
    llama = run / "random-llama"
    shutil.rmtree(llama, ignore_errors=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **LANGUAGE_MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    add_vision(llama, start, visual_experts=())


def tokenizer_of(records: Iterable[Record]) -> PreTrainedTokenizerFast:
    """The tokenizer of a language model that is trained on these records.

    Args:
        records: Everything in `language.json` of the world, once.
    """
    return train_tokenizer([*texts_of(records), *load_english("train")])


def add_vision(
    llm: Path,
    out: Path,
    visual_experts: tuple[str, ...] = ("ffn",),
    *,
    vision: Mapping[str, Any] = VISION,
    seed: int = 0,
    weights_of: Path | None = None,
    **config_fields: Any,
) -> Path:
    """Make the model that the stages start from, monolithic or modular, and its processor.

    Args:
        llm: Plain Llama checkpoint.
        out: Folder of the result, in the released layout.
        visual_experts: Which parts of each layer get a visual copy.
        vision: Fields of the vision configuration.
        seed: Of the first weights of patch embedding and projector.
        weights_of: Checkpoint of the same vision shapes to take those first weights from instead.
        **config_fields: More fields of `MonoInternVLConfig` (`image_attention`, ...).
    """
    made = monolithic_from_llm(
        llm,
        vision=MonoInternVLVisionConfig(**vision),
        visual_experts=visual_experts,
        seed=seed,
        max_dynamic_patch=1,
        use_thumbnail=False,
        **config_fields,
    )
    if weights_of is not None:
        other = MonoInternVLForConditionalGeneration.from_pretrained(weights_of).state_dict()
        of_language = ("model.language_model.", "lm_head.")
        weights = {name: x for name, x in other.items() if not name.startswith(of_language)}
        made.model.load_state_dict(weights, strict=False)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    made.tokenizer.save_pretrained(partial)
    processor = MonoInternVLProcessor.from_config(
        made.model.config, load_tokenizer(partial), default_system_prompt=""
    )
    save_with_processor(made.model, processor, partial)
    partial.rename(out)
    return out


def _drop_visual_rows(model: MonoInternVLForConditionalGeneration, vocab_size: int) -> None:
    """Cut the embedding and the head back to the language model's own vocabulary."""
    embedding, head = model.model.language_model.embed_tokens, model.lm_head
    with torch.no_grad():
        embedding.weight = torch.nn.Parameter(embedding.weight[:vocab_size].clone())
        head.weight = torch.nn.Parameter(head.weight[:vocab_size].clone())
    model.config.text_config.vocab_size = vocab_size


def main() -> None:
    """Make the language model that the package ships."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="output folder; RUN/llm is the language model")
    parser.add_argument("--processes", type=int, default=1, help="training processes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = write_world(arguments.run / "data", FULL, seed=0)
    compute = make_plan(
        "cpu", processes=arguments.processes, batch_size=LANGUAGE.stages[0].batch_size
    )
    made = make_language_model(world, arguments.run, compute=compute)
    logger.info("made %s", made)


if __name__ == "__main__":
    main()
