"""Peak memory of loading and running a checkpoint of the 2B shape, in a process of its own.

It writes 6.2 GB to the temporary folder and reads them back, so it runs on request only:
`RUN_SLOW=1 pytest tests/costs/test_memory_2b.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mono_internvl.checkpoints.presets import preset
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.released.keys import expected_shapes

SHARD_BYTES = 1_000_000_000

RUN = """
import json, sys, time
import torch
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration

def peak_bytes():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

start = time.time()
model = MonoInternVLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded, load_s = peak_bytes(), time.time() - start
config = model.config
side, context = config.force_image_size, config.num_image_tokens_per_tile
token = config.image_token_id
image = [token - 2] + [token] * context + [token - 1]
ids = torch.tensor([[1, *image, *range(100, 110)]])
out = model.generate(
    ids, pixel_values=torch.randn(1, 3, side, side), max_new_tokens=32, do_sample=False,
    eos_token_id=-1,
)
assert out.shape[1] == ids.shape[1] + 32
print(json.dumps({"loaded": loaded, "peak": peak_bytes(), "load_s": round(load_s, 1),
                  "total_s": round(time.time() - start, 1)}))
"""


def _write_2b(folder: Path) -> int:
    """A checkpoint of the 2B shape in bf16 shards, all of it from one random buffer; its bytes."""
    config = preset("mono-internvl-2b")
    with torch.device("meta"):
        model = MonoInternVLForConditionalGeneration(config)
    shapes = {key: torch.Size(shape) for key, shape in expected_shapes(model, config).items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(s.numel() for s in shapes.values()), generator=generator)
    noise = (0.02 * noise).to(torch.bfloat16)

    shards: list[dict[str, torch.Size]] = [{}]
    for key, shape in shapes.items():
        if 2 * sum(s.numel() for s in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = shape
    weight_map = {}
    folder.mkdir()
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: noise[: shape.numel()].reshape(shape).clone() for key, shape in shard.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("RUN_SLOW") != "1", reason="writes and loads 6.2 GB; set RUN_SLOW=1"
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM needs Linux")
def test_memory_of_2b_checkpoint_stays_near_its_size(tmp_path: Path) -> None:
    size = _write_2b(tmp_path / "2b")
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "2b")],
        capture_output=True,
        text=True,
        check=False,
    )
    for file in (tmp_path / "2b").iterdir():
        file.unlink()
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    print(f"file {size} bytes, {measured}")
    assert 6.2e9 < size < 6.3e9
    assert measured["peak"] < 1.2 * size + 1e9, measured
