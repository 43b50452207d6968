"""A checkpoint, data and stages small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mono_internvl.checkpoints.from_llm import monolithic_from_llm
from mono_internvl.checkpoints.initialize import save_with_processor
from mono_internvl.configuration.model import MonoInternVLVisionConfig
from mono_internvl.miniature.tokenizer import train_tokenizer
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.tokenizer import load_tokenizer
from mono_internvl.training.recipe import Rule, Stage

TILE_PX, TOKENS_PER_TILE = 56, 4
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}
VISION_AND_EXPERTS = (Rule(r"vision_embedder\.|projector\.|_visual\.", 3e-3), Rule(".*", None))
ALL = (Rule(".*", 3e-3),)


def write_checkpoint(
    folder: Path,
    visual_experts: Sequence[str] = ("ffn",),
    max_dynamic_patch: int = 1,
    **llama: Any,
) -> Path:
    """A monolithic model made of a random Llama, with its processor, in the released layout."""
    words = ["what colour is this? " + " ".join(COLOURS), "say one two three four five six"]
    tokenizer = train_tokenizer(words * 20, vocab_size=320)
    plain = folder.with_name(folder.name + "-llama")
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), **{**fields, **llama})
        LlamaForCausalLM(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    made = monolithic_from_llm(
        plain,
        vision=MonoInternVLVisionConfig(
            kind="patch", hidden_size=16, image_size=TILE_PX, patch_size=14
        ),
        visual_experts=visual_experts,
        max_dynamic_patch=max_dynamic_patch,
        use_thumbnail=max_dynamic_patch > 1,
    )
    made.tokenizer.save_pretrained(folder)
    processor = MonoInternVLProcessor.from_config(
        made.model.config, load_tokenizer(folder), default_system_prompt=""
    )
    save_with_processor(made.model, processor, folder)
    return folder


def image_record(folder: Path, number: int) -> dict[str, Any]:
    """A noisy picture of one colour and the question which."""
    colour = list(COLOURS)[number % len(COLOURS)]
    rng = np.random.default_rng(number)
    pixels = np.array(COLOURS[colour]) + rng.integers(-25, 25, (TILE_PX, TILE_PX, 3))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{number}.png")
    return {
        "id": f"image-{number}",
        "image": f"images/{number}.png",
        "kind": "colour",
        "metric": "exact",
        "answer": colour,
        "conversations": [
            {"from": "human", "value": "<image>\nwhat colour is this?"},
            {"from": "gpt", "value": colour},
        ],
    }


def text_record(number: int) -> dict[str, Any]:
    """A text-only exchange, longer or shorter with its number."""
    said = " ".join(("one", "two", "three", "four", "five", "six")[: 1 + number % 6])
    return {
        "id": f"text-{number}",
        "kind": "copying",
        "metric": "exact",
        "answer": said,
        "conversations": [
            {"from": "human", "value": f"say {said}"},
            {"from": "gpt", "value": said},
        ],
    }


def write_lines(file: Path, records: list[Any]) -> Path:
    """JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_data(folder: Path, images: int = 18, texts: int = 10) -> Path:
    """`mixed.json`, `images.json` and `text.json`, meta files of small sources."""
    sources = {
        "images": [image_record(folder, i) for i in range(images)],
        "text": [text_record(i) for i in range(texts)],
    }
    entries = {}
    for name, records in sources.items():
        # Lines of one length, so that records with and without image meet in a batch.
        padded = [{**record, "note": "." * (240 - len(json.dumps(record)))} for record in records]
        write_lines(folder / f"{name}.jsonl", padded)
        entries[name] = {"root": ".", "annotation": f"{name}.jsonl", "repeat_time": 1}
        (folder / f"{name}.json").write_text(json.dumps({name: entries[name]}))
    (folder / "mixed.json").write_text(json.dumps(entries))
    return folder


def tiny_stage(**fields: Any) -> Stage:
    """Twelve fp32 steps on the mixed data; everything learns."""
    common: dict[str, Any] = {
        "name": "tiny",
        "title": "a test",
        "data": "mixed.json",
        "rules": ALL,
        "steps": 12,
        "batch_size": 4,
        "schedule": "cosine",
        "warmup_steps": 2,
        "max_tokens": 128,
        "max_tiles": 1,
        "precision": "fp32",
        "checkpoint_every": 4,
    }
    return Stage(**{**common, **fields})


def metric_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file without the time they took."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    timed = {"seconds", "tokens_per_s", "images_per_s", "mfu"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]
