"""The result of a run: the parts of all layers in a few files, the rest of the checkpoint beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.files import sha256
from quant.storage import INDEX_FILE, SCHEMA, TENSORS_FILE
from quant.stored import StoredLayer
from quant.stream.adapters import write_adapters
from quant.stream.byte_copy import split, write_safetensors
from quant.stream.config import StreamConfig
from quant.stream.header import StoredTensor
from quant.stream.layers import Layer
from quant.stream.part import Part
from quant.stream.source import Checkpoint
from quant.stream.work import DONE_FILE, RESULT_FOLDER, Job, written_before
from quant.stream.work import SCHEMA as STREAM_SCHEMA

REST_FILE, REST_HASHES = "unquantized.safetensors", "unquantized_sha256"
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the files that are copied along: the configuration and the tokenizer's."""
OWN_FILES = (INDEX_FILE, DONE_FILE)


def assemble(job: Job, parts: Mapping[str, Part], checkpoint: Checkpoint, config: StreamConfig) -> None:
    """Write the result from the parts, then put it into the output folder file by file.

    Nothing in the output folder changes before the last byte is written. `stream.json`, which comes last, says
    that all is there.

    Args:
        job: What is assembled, and where.
        parts: The finished part of each layer by its name.
        checkpoint: The source.
        config: As in `loftq_checkpoint`.

    Raises:
        QuantError: A file of the source changed meanwhile.
    """
    result = job.work / RESULT_FOLDER
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    _copy_companions(checkpoint.folder, result)
    rest = write_shards(result, REST_FILE, _rest(checkpoint, job.layers), config.shard_bytes)
    shards = write_shards(result, TENSORS_FILE, _packed(job.layers, parts), config.shard_bytes)
    index = _index(job.layers, config, _hashes(result, shards))
    _write_json(result / INDEX_FILE, {**index, REST_HASHES: _hashes(result, rest)})
    if config.peft_adapters:
        write_adapters(result, job.layers, parts, config)
    _publish(job, result, _layer_reports(job.layers, parts))


def write_shards(folder: Path, name: str, tensors: Mapping[str, StoredTensor], most: int) -> list[str]:
    """Write tensors to one file, or to several with an index in the layout of transformers.

    Args:
        folder: Where they go.
        name: Of the file if one is enough, such as "quant.safetensors".
        tensors: By key.
        most: Bytes that a file should not exceed.

    Returns:
        The names of the files; none without tensors.
    """
    shards = split(tensors, most)
    stem = name.removesuffix(".safetensors")
    numbered = [f"{stem}-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
    names = [name] if len(shards) == 1 else numbered
    for file_name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file_name, shard)
    if len(shards) > 1:
        weight_map = {key: file_name for file_name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{name}.index.json", index)
    return names


def _packed(layers: list[Layer], parts: Mapping[str, Part]) -> dict[str, StoredTensor]:
    """Return what goes with the layers: the tensors of their parts, and biases as they were."""
    packed: dict[str, StoredTensor] = {}
    for layer in layers:
        packed.update(parts[layer.name].tensors)
        if layer.bias is not None:
            packed[f"{layer.name}.bias"] = layer.bias
    return packed


def _rest(checkpoint: Checkpoint, layers: list[Layer]) -> dict[str, StoredTensor]:
    """Return the tensors that belong to no layer."""
    taken = {tensor.key for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None}
    return {key: tensor for key, tensor in sorted(checkpoint.tensors.items()) if key not in taken}


def _index(layers: list[Layer], config: StreamConfig, hashes: dict[str, str]) -> dict[str, Any]:
    entries = {
        layer.name: StoredLayer(
            kind="linear",
            format=layer.format,
            block_size=config.block_size,
            shape=layer.shape,
            rank=config.rank,
            scaling=config.scaling,
        ).entry()
        for layer in layers
    }
    single = hashes.get(TENSORS_FILE)
    return {"schema": SCHEMA, "layers": entries, "sha256": hashes if single is None else single}


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names}


def _layer_reports(layers: list[Layer], parts: Mapping[str, Part]) -> dict[str, Any]:
    reports = {}
    for layer in layers:
        bias = 0 if layer.bias is None else layer.bias.nbytes
        stacked = 1 if layer.index is None else layer.weight.shape[0]
        after = sum(tensor.nbytes for tensor in parts[layer.name].tensors.values())
        reports[layer.name] = {
            "errors": parts[layer.name].errors,
            "bytes_before": layer.weight.nbytes // stacked + bias,
            "bytes_after": after + bias,
        }
    return reports


def _copy_companions(source: Path, result: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = path.suffix in COMPANIONS and not path.name.endswith(".index.json")
        if wanted and path.is_file() and path.name not in OWN_FILES:
            shutil.copyfile(path, result / path.name)


def _publish(job: Job, result: Path, reports: dict[str, Any]) -> None:
    """Move the result into the output folder, and remove what an earlier run wrote and this one did not."""
    sizes = {
        path.relative_to(result).as_posix(): path.stat().st_size
        for path in sorted(result.rglob("*"))
        if path.is_file()
    }
    _write_json(
        result / DONE_FILE,
        {"schema": STREAM_SCHEMA, "job": job.identity, "files": sizes, "layers": reports},
    )
    stale = [name for name in written_before(job.output) if name not in sizes]
    # The index with the hashes comes late, the mark that all is there last.
    for name in [*sorted(sizes, key=lambda name: name == INDEX_FILE), DONE_FILE]:
        (job.output / name).parent.mkdir(exist_ok=True)
        with (result / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(result / name, job.output / name)
    for name in stale:
        (job.output / name).unlink(missing_ok=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
