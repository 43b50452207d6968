"""Train a LoRA adapter, load it again, merge it: python examples/peft_lora.py --model DIR"""

import argparse
from pathlib import Path

import torch
from collate import Collator
from peft import LoraConfig, PeftModel, get_peft_model
from rows import eight_rows

from mono_internvl import MonoInternVLForConditionalGeneration, MonoInternVLProcessor, load

# Attention and both experts of every layer; the visual expert is `mlp_visual`.
TARGETS = r".*\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp(_visual)?\.(gate|up|down)_proj)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("lora-out"))
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    processor = MonoInternVLProcessor.from_pretrained(options.model)
    model = get_peft_model(
        MonoInternVLForConditionalGeneration.from_pretrained(options.model),
        LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
    )
    model.print_trainable_parameters()
    batch = Collator(processor)(eight_rows())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.save_pretrained(options.out / "adapter")

    base = MonoInternVLForConditionalGeneration.from_pretrained(options.model)
    merged = PeftModel.from_pretrained(base, options.out / "adapter").merge_and_unload()
    merged.save_pretrained(options.out / "merged")
    processor.save_pretrained(options.out / "merged")

    row = eight_rows()[0]
    print(load(options.out / "merged").ask(row["question"], row["image"], max_new_tokens=8).text)


if __name__ == "__main__":
    main()
