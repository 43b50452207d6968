"""Fine-tune every weight with transformers' Trainer: python examples/trainer.py --model DIR"""

import argparse
from pathlib import Path

import torch
from collate import Collator
from rows import eight_rows
from transformers import Trainer, TrainingArguments

from mono_internvl import MonoInternVLForConditionalGeneration, MonoInternVLProcessor, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("trainer-out"))
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    processor = MonoInternVLProcessor.from_pretrained(options.model)
    trainer = Trainer(
        model=MonoInternVLForConditionalGeneration.from_pretrained(options.model),
        args=TrainingArguments(
            output_dir=str(options.out / "states"),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the collator needs the rows as they are
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=eight_rows(),
        data_collator=Collator(processor),
    )
    trainer.train()
    trainer.save_model(str(options.out))
    processor.save_pretrained(options.out)

    row = eight_rows()[0]
    print(load(options.out).ask(row["question"], row["image"], max_new_tokens=8).text)


if __name__ == "__main__":
    main()
