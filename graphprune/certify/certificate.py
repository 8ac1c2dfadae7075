"""The certificate: a proof by the model itself that its node groups are right.

Renumbering the units of a correct group changes nothing; removing units is the same as zeroing what its members name.
Both are checked on the traced graph in float64, on the model's own weights, all groups at once; when a check fails,
group by group, to name the culprit. Members that only read a unit could be left out unnoticed so: that the members are
all that a group reaches is checked too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphprune.certify.membership import wrong_members
from graphprune.certify.routing import forbid_choices
from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.node_group import NodeGroup
from graphprune.coupling.selection import Indices
from graphprune.errors import VerificationError
from graphprune.shrink.fitting import check_groups, check_model
from graphprune.shrink.program import Program, traced_inputs
from graphprune.shrink.resize import resize
from graphprune.shrink.weights import named_weights, select_weight, zero_weight
from graphprune.trace.inputs import keyword_inputs

if TYPE_CHECKING:
    from graphprune.certify.onnx import OnnxTrial

TOLERANCE = 1e-9
ONNX_TOLERANCE = 1e-4
# Beside numbers of ordinary size nothing in float64, and yet divided by itself it is one: a DoRA magnitude over the
# norm of its row stays a number.
ALMOST_ZERO = 1e-40


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the checks measured.

    Errors are the largest absolute difference of any output, divided by the largest absolute output.

    Attributes:
        groups: How many groups were permuted.
        pruned_groups: How many groups lost units.
        permuted_max_error: After renumbering the units of all groups at random at once.
        removed_max_error: Between removing random units and zeroing them.
        removed_effect: How far zeroing those units moved the outputs: a check that moved nothing proves nothing.
        tolerance: What an error may be.
        failures: Names of groups that fail on their own.
        wrong_members: What groups' members lack, or name wrongly, in words.
    """

    groups: int
    pruned_groups: int
    permuted_max_error: float
    removed_max_error: float
    removed_effect: float
    tolerance: float
    failures: tuple[str, ...]
    wrong_members: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether members and both errors are right, and the removal that was checked did something."""
        if self.wrong_members:
            return False
        within = self.permuted_max_error <= self.tolerance and self.removed_max_error <= self.tolerance
        return within and (self.removed_effect > 0 or self.pruned_groups == 0)

    def raise_if_failed(self) -> None:
        """Raise if the groups are wrong.

        Raises:
            VerificationError: With the numbers and the groups that fail.
        """
        if self.removed_effect == 0 and self.pruned_groups:
            raise VerificationError(
                "the units that were removed for the check had no effect on the outputs, so nothing is proven",
                "certify with another seed, or with example inputs that reach those units",
            )
        if self.wrong_members:
            raise VerificationError(
                "the node groups' members are wrong:\n  - " + "\n  - ".join(self.wrong_members),
                "take the groups as node_groups returns them; if these are, please report this model",
            )
        if not self.ok:
            raise VerificationError(
                f"the node groups are wrong for this model: permutation moves its outputs by "
                f"{self.permuted_max_error:.1e}, removal differs from zeroing by {self.removed_max_error:.1e} "
                f"(tolerance {self.tolerance:.0e}); groups that fail alone: {', '.join(self.failures) or 'none'}",
                "please report this model: a rule in graphprune/coupling/rules is wrong for one of its operators",
            )

    def row(self) -> dict[str, Any]:
        """Return the certificate as a plain row."""
        return {**asdict(self), "ok": self.ok}


def certify(
    model: Any,
    groups: NodeGroups,
    example_inputs: Any = None,
    *,
    seed: int = 0,
    tolerance: float | None = None,
) -> Certificate:
    """Check node groups against the model that they were read off.

    Weights that are constant (a fresh adapter's zeros, a norm's ones) would hide mistakes; they are replaced by
    random numbers for the check. The model is not changed.

    Args:
        model: The model, with its weights: a torch module or an exported program. For groups of an ONNX graph it is
            the file itself that is checked: its path, an `onnx_ir.Model`, or None for the one that was traced.
        groups: Its node groups.
        example_inputs: Keyword arguments of its forward, by default those of the trace; one tensor, or a tuple of
            the first arguments, will do. An ONNX graph needs them: arrays or tensors by name.
        seed: Of the permutations, the removed units and the random numbers.
        tolerance: Largest error, relative to the largest output; by default 1e-9 in float64, and 1e-4 for an ONNX
            file, which runs in float32.

    Raises:
        CouplingError: If these are no groups, or those of another model.
        InputsError: If an input is missing.
        NothingPrunableError: If no group can be permuted, so that there is nothing to check; lists the reasons.
    """
    check_groups(groups)
    movable = [group for group in groups.values() if group.permutable]
    if not movable:
        groups.prunable()  # there are none, which raises with the reasons
    if not isinstance(groups.graph.program, ExportedProgram):
        return _certify_onnx(model, groups, example_inputs or {}, seed, tolerance or ONNX_TOLERANCE)
    check_model(model, groups)
    tolerance = tolerance or TOLERANCE
    if example_inputs is None:
        example_inputs = traced_inputs(groups.graph.program)
    elif isinstance(model, nn.Module) and not isinstance(example_inputs, Mapping):
        example_inputs = keyword_inputs(model, example_inputs)
    trial = _Trial(model, groups, example_inputs, np.random.default_rng(seed))
    prunable = [group for group in groups.values() if group.prunable]
    return _measured(trial, groups, prunable, tolerance)


def _measured(
    trial: _Trial | OnnxTrial, groups: NodeGroups, prunable: list[NodeGroup], tolerance: float
) -> Certificate:
    movable = [group for group in groups.values() if group.permutable]
    permuted = trial.permuted_error(movable)
    removed, effect = trial.removed_error(prunable) if prunable else (0.0, 0.0)
    wrong = wrong_members(groups)
    failures = list(wrong)
    if not permuted <= tolerance:
        failures += _failing(movable, lambda some: trial.permuted_error(some) <= tolerance)
    if not removed <= tolerance:
        failures += _failing(prunable, lambda some: trial.removed_error(some)[0] <= tolerance)
    return Certificate(
        groups=len(movable),
        pruned_groups=len(prunable),
        permuted_max_error=permuted,
        removed_max_error=removed,
        removed_effect=effect,
        tolerance=tolerance,
        failures=tuple(dict.fromkeys(failures)),
        wrong_members=_told(wrong),
    )


def _failing(groups: list[NodeGroup], holds: Callable[[list[NodeGroup]], bool]) -> list[str]:
    """Return which of some groups that fail together fail alone, looking only into halves that fail."""
    if len(groups) == 1:
        return [groups[0].name]
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:])
    return [name for half in halves if not holds(half) for name in _failing(half, holds)]


def _certify_onnx(
    model: Any, groups: NodeGroups, inputs: Mapping[str, Any], seed: int, tolerance: float
) -> Certificate:
    from graphprune.certify.onnx import OnnxTrial
    from graphprune.shrink.onnx import fitting_model

    trial = OnnxTrial(groups, inputs, seed=seed, model=fitting_model(model, groups))
    prunable = trial.removable([group for group in groups.values() if group.prunable])
    return _measured(trial, groups, prunable, tolerance)


def _told(wrong: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(f"{name}: {fault}" for name, faults in wrong.items() for fault in faults)


class _Trial:
    """The traced graph in float64, its weights, and its outputs before anything is done to them."""

    def __init__(
        self, model: Any, groups: NodeGroups, inputs: Mapping[str, Any], generator: np.random.Generator
    ) -> None:
        self._groups = groups
        self._inputs = {name: _double(value) for name, value in inputs.items()}
        self._generator = generator
        self._program = Program(groups.graph.program).in_double()
        self._weights = _probing_weights(model, generator)
        self._reference = self._program(self._weights, self._inputs)

    def permuted_error(self, groups: list[NodeGroup]) -> float:
        """Renumber the units of `groups` at random; return how far the outputs move."""
        order = {group.name: self._generator.permutation(group.size) for group in groups}
        return self._error_of(order, self._reference)

    def removed_error(self, groups: list[NodeGroup]) -> tuple[float, float]:
        """Remove random units of `groups`; return the distance from zeroing them, and what zeroing did."""
        kept = {group.name: self._survivors(group) for group in groups}
        zeroed = {
            name: zero_weight(name, tensor, self._groups, kept, almost=ALMOST_ZERO)
            for name, tensor in self._weights.items()
        }
        expected = forbid_choices(self._program, self._groups, kept)(zeroed, self._inputs)
        del zeroed
        return self._error_of(kept, expected), _error(expected, self._reference)

    def _error_of(self, kept: Mapping[str, Indices], expected: tuple[Tensor, ...]) -> float:
        """Run with some units only, in some order, and compare."""
        selected = resize(self._program, self._groups, kept)
        try:
            outputs = selected(self._selected(kept), self._inputs)
        except (
            RuntimeError,
            IndexError,
            ValueError,
        ):  # shapes that no longer fit each other: the groups are wrong
            return float("inf")
        return _error(outputs, expected)

    def _selected(self, kept: Mapping[str, Indices]) -> dict[str, Tensor]:
        return {
            name: select_weight(name, tensor, self._groups, kept) for name, tensor in self._weights.items()
        }

    def _survivors(self, group: NodeGroup) -> Indices:
        most = min(group.size // 2, group.size - group.minimum)
        gone = self._generator.integers(1, max(1, most) + 1)
        return np.sort(self._generator.permutation(group.size)[gone:])


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _probing_weights(model: Any, generator: np.random.Generator) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    doubled: dict[int, Tensor] = {}
    for name, tensor in named_weights(model):
        if id(tensor) not in doubled:
            doubled[id(tensor)] = _probe(tensor.detach(), generator)
        weights[name] = doubled[id(tensor)]
    return weights


def _probe(tensor: Tensor, generator: np.random.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        noise = torch.from_numpy(generator.standard_normal(tuple(tensor.shape)))
        return tensor.double() + 0.05 * noise.to(tensor.device)
    return tensor.double()


def _error(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    worst = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        if not reference.is_floating_point():
            continue
        if output.shape != reference.shape:
            return float("inf")
        scale = float(reference.abs().max())
        distance = float((output - reference).abs().max())
        worst = max(worst, distance / scale if scale > 0 else distance)
        if distance != distance:
            return float("nan")
    return worst
