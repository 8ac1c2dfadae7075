"""Where an interrupted recovery goes on: after its last finished round, exactly as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphprune.errors import TrainingError
from graphprune.files import replacing, write_json
from graphprune.recover.rounds import Round

SCHEMA = "graphprune.recovery/1"
_STATE = "state.json"

Row = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass
class RecoveryState:
    """How far a recovery is.

    Attributes:
        phase: Place of the phase that is under way, or number of phases once all are done.
        number: Rounds that are done of it; None before it has begun.
        drawn: Windows that it drew of each of its sources.
        dense: The dense model's loss on each source, in nats per token.
        rounds: All measured rounds so far.
        rows: Metrics of all steps so far.
        adapters: As they are now, by name.
        best: As they were in the best round.
        moments: The optimizer's state, by ``name/key``.
    """

    phase: int = 0
    number: int | None = None
    drawn: list[int] | None = None
    dense: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    adapters: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)


def save_state(folder: Path, stamp: str, state: RecoveryState) -> None:
    """Write a checkpoint.

    The tensors' file gets a name of its own, and the small file that names it is replaced last: whenever the process
    is killed, one whole checkpoint is there.

    Args:
        folder: Made if it is not there.
        stamp: From `stamp_of`.
        state: What is kept.
    """
    name = f"phase{state.phase}-round{state.number or 0}.safetensors"
    parts = {"adapters": state.adapters, "best": state.best, "moments": state.moments}
    tensors = {
        f"{part}/{key}": tensor.detach().cpu().contiguous().clone()
        for part, values in parts.items()
        for key, tensor in values.items()
    }
    with replacing(folder / name) as temporary:
        save_file(tensors, temporary)
    row = {
        "schema": SCHEMA,
        "stamp": stamp,
        "tensors": name,
        "phase": state.phase,
        "number": state.number,
        "drawn": state.drawn,
        "dense": state.dense,
        "rounds": [round_.row() for round_ in state.rounds],
        "rows": state.rows,
    }
    write_json(folder / _STATE, row)
    for old in folder.glob("phase*.safetensors"):
        if old.name != name:
            old.unlink()


def load_state(folder: Path, stamp: str) -> RecoveryState | None:
    """Read a checkpoint.

    Returns:
        None if there is none, or it belongs to another model, other settings or other text.

    Raises:
        TrainingError: If it cannot be read.
    """
    if not (folder / _STATE).is_file():
        return None
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA or state["stamp"] != stamp:
            return None
        tensors = load_file(folder / state["tensors"])
        return RecoveryState(
            phase=state["phase"],
            number=state["number"],
            drawn=state["drawn"],
            dense=state["dense"],
            rounds=[Round(**row) for row in state["rounds"]],
            rows=state["rows"],
            adapters=_part(tensors, "adapters"),
            best=_part(tensors, "best"),
            moments=_part(tensors, "moments"),
        )
    except Exception as error:
        raise TrainingError(
            f"the checkpoint in {folder} cannot be read: {error!r}",
            "remove that folder to start recovery anew",
        ) from error


def stamp_of(model: nn.Module, *described: str) -> str:
    """Return a hash of a model's frozen weights, of its adapters' names and shapes, and of what else decides."""
    digest = hashlib.sha256("\n".join(described).encode())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if name not in trained:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def moments_of(optimizer: torch.optim.Optimizer, names: list[str]) -> Tensors:
    """Return an optimizer's state by the names of its parameters, which stand in their order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[place]}/{key}": value for place, values in state.items() for key, value in values.items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, names: list[str], moments: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `moments_of` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in moments.items():
        name, _, key = path.rpartition("/")
        state.setdefault(names.index(name), {})[key] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _part(tensors: Tensors, part: str) -> Tensors:
    prefix = f"{part}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
