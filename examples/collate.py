"""Rows to a batch: ids, labels on the answers alone, and the tiles of all images."""

import torch
from torch.nn.utils.rnn import pad_sequence

from mono_internvl import MonoInternVLProcessor


class Collator:
    """Makes batches for `Trainer` or a loop of your own."""

    def __init__(self, processor: MonoInternVLProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        samples = [
            self.processor.encode_conversation(
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": row["image"]},
                            {"type": "text", "text": row["question"]},
                        ],
                    },
                    {"role": "assistant", "content": row["answer"]},
                ]
            )
            for row in rows
        ]
        pad = self.processor.tokenizer.pad_token_id
        ids = [sample.input_ids for sample in samples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(
                [s.labels for s in samples], batch_first=True, padding_value=-100
            ),
            "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
        }
