"""A checkpoint on disk for streams to work on, and what they leave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.stream import StreamConfig

CONFIG = StreamConfig(rank=4, iterations=2, block_size=16)

WIDTH, INNER, WORDS = 32, 48, 40


def checkpoint_tensors() -> dict[str, Tensor]:
    """Two blocks of odd neighbours: three dtypes, a bias, a norm, an embedding, a head, integers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": drawn(WORDS, WIDTH), "lm_head.weight": drawn(WORDS, WIDTH)}
    for block in range(2):
        at = f"model.layers.{block}"
        tensors[f"{at}.attention.query.weight"] = drawn(WIDTH, WIDTH, dtype=torch.float16)
        tensors[f"{at}.attention.query.bias"] = drawn(WIDTH, dtype=torch.float16)
        tensors[f"{at}.up.weight"] = drawn(INNER, WIDTH, dtype=torch.float32)
        tensors[f"{at}.down.weight"] = drawn(WIDTH, INNER)
        tensors[f"{at}.norm.weight"] = drawn(WIDTH)
        tensors[f"{at}.steps"] = torch.arange(3)
    return tensors


LAYERS = [f"model.layers.{block}.{name}" for block in range(2) for name in ("attention.query", "down", "up")]


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], files: int = 2) -> Path:
    """Write tensors as transformers does, dealt out over some files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {
        key: f"model-{place % files + 1:05d}-of-{files:05d}.safetensors" for place, key in enumerate(tensors)
    }
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a result, but for the record of the job, which names times of the source."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "stream.json" and ".work" not in path.parts
    }


def stored_tensors(folder: Path, stem: str = "quant") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{stem}*.safetensors")):
        found = load_file(path)
        assert tensors.keys().isdisjoint(found)
        tensors.update(found)
    return tensors


def parts_of(output: Path) -> list[Path]:
    """Return the finished layers of a run that was stopped."""
    return sorted((output / ".work").glob("parts*/*.safetensors"))
