"""What is fuzzed: each target makes valid input once, and then damages and reads it, case by case.

A new target is a function from a folder to a function of a random generator, in `TARGETS`.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import tiny_runs
from mutations import mutated, mutated_bytes, mutated_json, mutated_text
from PIL import Image
from transformers import LlamaConfig, Qwen3Config, SmolLM3Config

from mono_internvl import load
from mono_internvl.checkpoints.llm_families import read_text_config
from mono_internvl.data.batches import BatchPlan, BatchStream
from mono_internvl.data.sources import JsonlSource
from mono_internvl.evaluation.benchmarks.records import RECORDS
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.image_files import load_image
from mono_internvl.processing.images import MonoInternVLImageProcessor
from mono_internvl.processing.processor import MonoInternVLProcessor
from mono_internvl.processing.prompts import Turn
from mono_internvl.processing.templates import JinjaForm, adapt_template
from mono_internvl.processing.tokenizer import load_tokenizer

Case = Callable[[random.Random], object]
GOLDEN = Path(__file__).parents[1] / "parity" / "golden"


def images(folder: Path) -> Case:
    """Image files of every format that is read, and of some that are not."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "maker", "comment"
    files = []
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "PPM", "TGA", "DDS", "ICO"):
        for picture in (Image.fromarray(pixels), Image.fromarray(pixels).convert("P")):
            buffer = io.BytesIO()
            options = {"exif": exif.tobytes()} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
            mode = picture.mode if kind in ("PNG", "GIF", "BMP", "TIFF") else "RGB"
            picture.convert(mode).save(buffer, kind, **options)
            files.append(buffer.getvalue())
    cutter = MonoInternVLImageProcessor(image_size=28, max_tiles=4)

    def case(rng: random.Random) -> object:
        return cutter.tiling_with().cut(load_image(mutated_bytes(rng.choice(files), rng)))

    return case


def checkpoints(folder: Path) -> Case:
    """Configuration, weights, index and generation settings of a checkpoint."""
    whole = tiny_runs.write_checkpoint(folder / "whole")
    model = MonoInternVLForConditionalGeneration.from_pretrained(whole)
    sharded = folder / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    damaged = folder / "damaged"

    def case(rng: random.Random) -> object:
        source = rng.choice((whole, sharded))
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(source, damaged)
        names = ["config.json"] * 3 + [
            name
            for name in sorted(os.listdir(damaged))
            if "config" in name or name.endswith((".safetensors", ".index.json"))
        ]
        _damage(damaged / rng.choice(names), rng)
        return MonoInternVLForConditionalGeneration.from_pretrained(damaged)

    return case


def processors(folder: Path) -> Case:
    """What a processor is read from."""
    whole, damaged = tiny_runs.write_checkpoint(folder / "whole"), folder / "damaged"
    names = ("processor_config.json", "tokenizer_config.json", "config.json", "chat_template.jinja")

    def case(rng: random.Random) -> object:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        _damage(damaged / rng.choice(names), rng)
        processor = MonoInternVLProcessor.from_pretrained(damaged)
        return processor.encode_prompt([{"role": "user", "content": "what colour?"}])

    return case


def tokenizers(folder: Path) -> Case:
    """Sentencepiece and JSON tokenizers, and the settings beside them."""
    fast = folder / "fast"
    load_tokenizer(GOLDEN / "tokenizer").save_pretrained(fast)
    (fast / "tokenizer.model").unlink(missing_ok=True)
    sources = (GOLDEN / "tokenizer", GOLDEN / "tokenizer_dummy_prefix", fast)
    damaged = folder / "damaged"

    def case(rng: random.Random) -> object:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(rng.choice(sources), damaged)
        files = [f for f in sorted(damaged.iterdir()) if f.suffix in (".json", ".model")]
        _damage(rng.choice(files), rng)
        tokenizer = load_tokenizer(damaged)
        return tokenizer.decode(tokenizer.encode_plain("the 12 \u4f60\u662f \U0001f600").ids)

    return case


def language_models(folder: Path) -> Case:
    """config.json of the language models that a checkpoint is made of."""
    configs = []
    for config in (LlamaConfig, Qwen3Config, SmolLM3Config):
        architecture = config.__name__.replace("Config", "ForCausalLM")
        config(architectures=[architecture], head_dim=128).save_pretrained(folder)
        configs.append(json.loads((folder / "config.json").read_text()))

    def case(rng: random.Random) -> object:
        (folder / "config.json").write_bytes(mutated_json(rng.choice(configs), rng))
        return read_text_config(folder)

    return case


_TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content.replace('/think', '')|trim %}{% else %}<|im_start|>{{ m.role }}\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}{{ ns.s }}",
)
_JINJA = [
    *("{%", "%}", "{{", "}}", "|", "~", "*", "+", "**", "(", ")", "[", "]", "'", ".", ",", "%"),
    *("{% for a in range(99999) %}", "{% endfor %}", "{% if messages %}", "{% endif %}", "loop("),
    *("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",),
    *("{% set x = 'ab' * 9999999 %}", "{% set x = x.replace('a', x) %}", "{{ x.join(x) }}"),
    *("{% set x = [x, x]|string %}", "{{ x[::-1]|tojson }}", "{{ x ** 99 }}", "{{ x|title }}"),
    *("{{ m.content * 999999999 }}", "{{ messages|tojson(indent=4) }}", "|replace('', 'aaaa')"),
    *("{% set x = x ~ x %}", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "|join('aaa')"),
    *("{{ messages|string }}", "{{ '%99999d' % 3 }}", "|map('upper')|list", "{% include 'a' %}"),
    *("\ue0000\ue001", "\U000f00000\U000f0001", "<|im_end|>", "None", "9999999999", "-1", "\x00"),
    *(".__class__", "|attr('__class__')", "raise_exception('a')", "namespace(a=1)", "dict(a=1)"),
]


def templates(folder: Path) -> Case:
    """Chat templates, rendered with and without a system message."""
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    turns = [Turn("user", ("Q",)), Turn("assistant", ("A",)), Turn("user", ("R",))]

    def case(rng: random.Random) -> object:
        source = rng.choice(_TEMPLATES)
        if rng.random() < 0.5:
            source = mutated_text(source, _JINJA, rng)
        else:  # statements that are whole, in any order
            whole = [piece for piece in _JINJA if piece[-2:] in ("}}", "%}")]
            source = "".join(rng.choices(whole, k=rng.randint(1, 4))) + source
        form = JinjaForm(adapt_template(source) if rng.random() < 0.5 else source, tokenizer)
        system = mutated_text("<|im_/thinkend|> be brief", [*_JINJA, "/think"], rng)
        return form.render(
            [Turn("system", (system,)), *turns],
            default_system_prompt="",
            add_generation_prompt=True,
        )

    return case


def records(folder: Path) -> Case:
    """Lines of an annotation, read for training and for evaluation."""
    session = load(tiny_runs.write_checkpoint(folder / "tiny"), device="cpu")
    valid = [tiny_runs.image_record(folder, 0), tiny_runs.text_record(3)]
    file = folder / "a.jsonl"
    plan = BatchPlan(batch_size=1, max_tokens=256, pad_token_id=0, image_token_id=1)

    def case(rng: random.Random) -> object:
        file.write_bytes(mutated_json(rng.choice(valid), rng) + b"\n")
        if rng.random() < 0.5:
            asked = RECORDS.questions(file)
            return [RECORDS.predict(one, "red", RECORDS.protocol).to_row() for one in asked]
        encode = session.processor.encode_conversation
        source = JsonlSource(file, folder)
        return BatchStream([source], lambda record: encode(record.turns), plan, seed=0)[0]

    return case


_REQUEST: dict[str, Any] = {
    "question": "what colour is this?",
    "images": ["images/0.png"],
    "max_tiles": 1,
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 5,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2,
    "seed": 3,
}


def requests(folder: Path) -> Case:
    """Arguments of `ask`."""
    session = load(tiny_runs.write_checkpoint(folder / "tiny"), device="cpu")
    tiny_runs.image_record(folder, 0)

    def case(rng: random.Random) -> object:
        changed = rng.sample(list(_REQUEST), rng.randint(1, 2))
        options = {k: mutated(v, rng) if k in changed else v for k, v in _REQUEST.items()}
        if isinstance(options["max_new_tokens"], int):  # it is answered as long as the context is
            options["max_new_tokens"] = min(options["max_new_tokens"], 2)
        session.reset()
        with chdir(folder):
            return session.ask(options.pop("question"), **options)

    return case


TARGETS: dict[str, Callable[[Path], Case]] = {
    target.__name__: target
    for target in (
        images,
        checkpoints,
        processors,
        tokenizers,
        language_models,
        templates,
        records,
        requests,
    )
}


def _damage(file: Path, rng: random.Random) -> None:
    data = file.read_bytes() if file.exists() else b"{}"
    if file.suffix == ".json" and rng.random() < 0.85:
        data = mutated_json(json.loads(data), rng)
    else:
        data = mutated_bytes(data, rng)
    file.write_bytes(data)
