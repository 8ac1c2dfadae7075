"""Knowledge distribution: how much worse the model gets when each group alone loses a share of its units.

LoRAShear (arXiv 2310.18356, section 3.2 and algorithm 3) prunes each node group alone at several ratios, notes how far
the model's score on an evaluation set moves, restores it, and makes the groups that matter most unprunable. Here gates
close in place of surgery, so that restoring is free, and what is measured becomes the cost of removing units.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.coupling.node_group import NodeGroup
from graphprune.errors import RecipeError, RunFolderError, TrainingError
from graphprune.files import write_json
from graphprune.prune.budget import Curve
from graphprune.saliency.gates import Gates

SCHEMA = "graphprune.distribution/1"
_SAME_LOSS = 1e-4


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one group does to the loss.

    Attributes:
        removed: How many units were closed, ascending.
        rises: By how much the loss was higher then, in nats a token.
    """

    removed: tuple[int, ...]
    rises: tuple[float, ...]

    def curve(self, size: int) -> Curve:
        """Return the rise with 0, 1, … `size` units removed, by straight lines between what was measured.

        It never falls: that the loss is lower without some units is noise, or their being unfit for this text alone.
        Past the last measurement it goes on as steeply as before it, and no less than on the average.
        """
        places = np.array([0, *self.removed], dtype=np.float64)
        rises = np.maximum.accumulate(np.array([0.0, *self.rises]))
        if places[-1] < size:
            steepness = max((rises[-1] - rises[-2]) / (places[-1] - places[-2]), rises[-1] / places[-1])
            rises = np.append(rises, rises[-1] + steepness * (size - places[-1]))
            places = np.append(places, size)
        return np.interp(np.arange(size + 1), places, rises)


@dataclass(frozen=True)
class Distribution:
    """The sensitivity of every group that was measured.

    Attributes:
        loss: Of the whole model, in nats a token.
        groups: By group name.
    """

    loss: float
    groups: Mapping[str, Sensitivity]

    def curves(self, sizes: Mapping[str, int]) -> dict[str, Curve]:
        """Return what each group loses with each number of units, in nats a token."""
        return {name: found.curve(sizes[name]) for name, found in self.groups.items()}

    def most_sensitive(self, share: float) -> tuple[str, ...]:
        """Return the share of groups, rounded down, whose mean rise over all ratios is largest, worst first."""
        worst = sorted(self.groups, key=lambda name: -float(np.mean(self.groups[name].rises)))
        return tuple(worst[: math.floor(share * len(worst) + 1e-9)])

    def rows(self, groups: Mapping[str, NodeGroup]) -> list[dict[str, Any]]:
        """Return one row a group, for pictures: name, kind, size, removed, rises."""
        return [
            {
                "name": name,
                "kind": groups[name].kind,
                "size": groups[name].size,
                "removed": list(found.removed),
                "rises": list(found.rises),
            }
            for name, found in self.groups.items()
        ]


def measure_distribution(
    gates: Gates,
    scores: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    ratios: Sequence[float],
    path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Distribution:
    """Close the least salient units of each group alone, at each ratio, and measure the loss.

    Args:
        gates: Gates on the groups to measure; they are left as they were.
        scores: Saliency of each unit, (units,), by group: the proxy by which units are closed.
        batches: Held-out token ids (batch, window), neither of the text that units were scored on nor of that which
            the model is judged by.
        loss: From a batch to the mean loss of its tokens.
        ratios: Shares of a group's units to close, between 0 and 1; each closes at least one unit and not all.
        path: A JSON file to keep measurements in: what it holds of the same measurement is not done again.
        progress: Told how many of how many groups are done.

    Raises:
        RecipeError: If there is no ratio, no text, or no group with two units.
        TrainingError: If the whole model's loss is not finite.
        RunFolderError: If the file is something else.
    """
    ratios = sorted(set(ratios))
    if not ratios or not 0 < ratios[0] <= ratios[-1] < 1:
        raise RecipeError(
            f"ratios is {ratios}", "give shares between 0 and 1 (recipe: prune.distribution.ratios)"
        )
    names = [name for name, group in gates.groups.items() if group.size > 1]
    if not batches or not names:
        what = "no text is left to measure on" if names else "no group has two units"
        raise RecipeError(
            f"knowledge distribution: {what}",
            "give more text or other kinds, or leave it out (recipe: prune.distribution)",
        )
    whole = _mean_loss(batches, loss)
    if not math.isfinite(whole):
        raise TrainingError(f"the whole model's loss is {whole}", "check the model and the text")
    key = _fingerprint(batches, ratios)
    found = _read(path, key, whole)
    for done, name in enumerate(names):
        closed = _closed(scores[name], ratios)
        order = hashlib.sha256(str(closed).encode()).hexdigest()
        if found.get(name, {}).get("units") != order:
            losses = [_loss_without(gates, name, units, batches, loss) for units in closed]
            removed = [len(units) for units in closed]
            found[name] = {"units": order, "removed": removed, "rises": [value - whole for value in losses]}
            if path is not None:
                write_json(path, {"schema": SCHEMA, "fingerprint": key, "loss": whole, "groups": found})
        if progress:
            progress(done + 1, len(names))
    return Distribution(
        whole, {n: Sensitivity(tuple(found[n]["removed"]), tuple(found[n]["rises"])) for n in names}
    )


def _closed(scores: Tensor, ratios: Sequence[float]) -> list[list[int]]:
    """Return the least salient units at each ratio, as many only once."""
    order = scores.argsort(stable=True).tolist()
    counts = sorted({min(max(1, round(ratio * len(order))), len(order) - 1) for ratio in ratios})
    return [order[:count] for count in counts]


def _loss_without(
    gates: Gates, name: str, units: list[int], batches: Sequence[Tensor], loss: Callable[[Tensor], Tensor]
) -> float:
    with _units_closed(gates.values[name], units):
        value = _mean_loss(batches, loss)
    # A model that breaks down altogether loses more than any number says; JSON and knapsacks need one.
    return value if math.isfinite(value) else 1e6


@contextmanager
def _units_closed(gate: Tensor, units: list[int]) -> Iterator[None]:
    before = gate.detach().clone()
    try:
        with torch.no_grad():
            gate[units] = 0
        yield
    finally:
        with torch.no_grad():
            gate.copy_(before)


@torch.no_grad()
def _mean_loss(batches: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> float:
    rows = sum(len(batch) for batch in batches)
    return sum(float(loss(batch)) * len(batch) for batch in batches) / rows


def _fingerprint(batches: Sequence[Tensor], ratios: Sequence[float]) -> str:
    digest = hashlib.sha256(str(list(ratios)).encode())
    for batch in batches:
        digest.update(str(tuple(batch.shape)).encode())
        digest.update(batch.cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path | None, key: str, whole: float) -> dict[str, dict[str, Any]]:
    """Return what a file holds of this very measurement, of a model of this loss; nothing if it is of another."""
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = content["schema"] == SCHEMA and content["fingerprint"] == key
        if not same or abs(content["loss"] - whole) > _SAME_LOSS * max(1.0, abs(whole)):
            return {}
        return dict(content["groups"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunFolderError(
            f"{path} is not a knowledge distribution: {error!r}", "remove it; it is measured anew"
        ) from error
