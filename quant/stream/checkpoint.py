"""LoftQ over a checkpoint on disk, a layer at a time, by one process or several."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from quant.apply import LayerReport
from quant.errors import QuantError
from quant.stream.adapters import check_adapters
from quant.stream.assemble import assemble
from quant.stream.config import StreamConfig
from quant.stream.layers import find_layers, share
from quant.stream.part import Part, write_part
from quant.stream.source import open_checkpoint
from quant.stream.work import Job

POLL_SECONDS = 0.2


def loftq_checkpoint(
    source: Path | str,
    output: Path | str,
    config: StreamConfig | None = None,
    *,
    on_layer: Callable[[str, int, int], None] | None = None,
    process: int | None = None,
    processes: int | None = None,
    device: str = "cpu",
    patience: float = 3600.0,
) -> list[LayerReport]:
    """Quantize the linear layers of a checkpoint that need not fit into memory.

    One weight at a time is read, put through `quant.loftq`, and written to a file in `output/.work`; when all
    are there, the first process puts the result together. A run that was stopped goes on where it was. Several
    processes share the layers out among themselves and talk through that folder alone; the result is the same
    for any number of them (with the same number of threads each, on the same kind of device).

    Args:
        source: Folder with `model.safetensors` or `model.safetensors.index.json`; float32, float16, bfloat16.
        output: Folder of the result, another than `source`: `quant.json` with `quant.safetensors` (or
            numbered files) for `load_quantized_`; `unquantized.safetensors`, all other tensors bit for bit;
            the source's configuration and tokenizer. A result of the same job is left as it is, that of
            another replaced at the end.
        config: Formats, rank, and which layers; None for the defaults.
        on_layer: Called after each layer of this process with its name, how many of this process's layers are
            done, and how many it has. What it raises ends the run.
        process: Which of the processes this is; None for RANK of the environment (torchrun's), else 0.
        processes: How many there are; None for WORLD_SIZE of the environment, else 1.
        device: Where LoftQ computes.
        patience: Seconds without a new layer from any process after which the others are given up.

    Returns:
        A report for each layer, sorted by name, on every process.

    Raises:
        QuantError: An argument is of no use, such as a device that is not there; the source is missing, damaged
            or quantized already, a weight cannot be quantized, the output is no folder, an unfinished run had
            other settings, or another process ended early. Whatever was in `output`
            before is still there, and so are the layers that are done.
    """
    config = config or StreamConfig()
    _check(config, device, patience)
    process, processes = _place(process, processes)
    checkpoint = open_checkpoint(Path(source))
    if Path(source).resolve() == Path(output).resolve():
        raise QuantError(f"{output} is source and output at once", "choose another folder for the result")
    layers = find_layers(checkpoint.tensors, config)
    if config.peft_adapters:
        check_adapters(layers)
    # Through JSON, as it will be read: what is a tuple here is a list there.
    identity = json.loads(json.dumps({"config": asdict(config), "source": checkpoint.identity()}))
    job = Job(output=Path(output).resolve(), identity=identity, layers=layers)
    if job.finished() is None:
        job.begin()
        _write_parts(job, config, process, processes, device, on_layer)
        if process == 0:
            assemble(job, _gather(job, patience), checkpoint, config)
        else:
            _wait(job, lambda: job.finished() is not None, patience)
    job.end()
    return _reports(job)


def _check(config: StreamConfig, device: str, patience: float) -> None:
    if not isinstance(config, StreamConfig):
        raise QuantError(
            f"config is a {type(config).__name__}",
            "pass a quant.stream.StreamConfig: it has the same settings, and excludes embeddings and heads by name",
        )
    if not patience >= 0:
        raise QuantError(f"a patience of {patience:g} seconds", "choose 0 seconds or more")
    try:
        torch.ones(1, device=device).item()
    # A build without the device's library fails an assertion.
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise QuantError(
            f"the device {device!r} cannot be used: {problem}", "choose another, such as cpu"
        ) from error


def _write_parts(
    job: Job,
    config: StreamConfig,
    process: int,
    processes: int,
    device: str,
    on_layer: Callable[[str, int, int], None] | None,
) -> None:
    places = {layer.name: place for place, layer in enumerate(job.layers)}
    own = share(job.layers, process, processes)
    for done, layer in enumerate(own, 1):
        place = places[layer.name]
        if job.part(place) is None:
            # A process that comes late may find that the others ended the job under its feet.
            if job.finished() is not None:
                return
            write_part(job.part_path(place), layer, config, device)
        if on_layer is not None:
            on_layer(layer.name, done, len(own))


def _gather(job: Job, patience: float) -> dict[str, Part]:
    """Return the parts of all layers by name once they are there; each is read a single time."""
    parts: dict[str, Part] = {}

    def complete() -> bool:
        for place, layer in enumerate(job.layers):
            part = None if layer.name in parts else job.part(place)
            if part is not None:
                parts[layer.name] = part
        return len(parts) == len(job.layers)

    _wait(job, complete, patience)
    return parts


def _wait(job: Job, ready: Callable[[], bool], patience: float) -> None:
    """Return once it is ready, or raise QuantError if for too long no process has finished a layer."""
    count, since = job.parts_written(), time.monotonic()
    while not ready():
        time.sleep(POLL_SECONDS)
        now = job.parts_written()
        if now != count:
            count, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            raise QuantError(
                f"{count} of {len(job.layers)} layers are in {job.work}, and for {patience:g} seconds no process "
                "has added one",
                "see what ended the other processes and run again: what is done is kept",
            )


def _place(process: int | None, processes: int | None) -> tuple[int, int]:
    process = int(os.environ.get("RANK", "0")) if process is None else process
    processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    if not 0 <= process < processes:
        raise QuantError(
            f"there is no process {process} of {processes}", "count from 0, as torchrun's RANK does"
        )
    return process, processes


def _reports(job: Job) -> list[LayerReport]:
    done = job.finished()
    if done is None:
        raise QuantError(f"the files of {job.output} changed while they were written", "run again")
    return [
        LayerReport(
            name=layer.name,
            shape=layer.shape,
            format=layer.format,
            errors=tuple(done["layers"][layer.name]["errors"]),
            bytes_before=done["layers"][layer.name]["bytes_before"],
            bytes_after=done["layers"][layer.name]["bytes_after"],
        )
        for layer in job.layers
    ]
