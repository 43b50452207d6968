"""Supervised fine-tuning with TRL, the model by path: python examples/trl_sft.py --model DIR"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from rows import eight_rows
from trl import SFTConfig, SFTTrainer

import mono_internvl  # noqa: F401 - transformers, and with it TRL, then knows the checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path("sft-out"))
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    rows = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in eight_rows()
    ]
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            max_length=None,  # an image must not be cut
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model()  # the processor, too


if __name__ == "__main__":
    main()
