"""Whether a module's own code follows its smaller weights: found out by running it against the shrunk graph.

Both run in float64 and on livelier weights: a freshly initialised model hardly moves its outputs, and a softmax whose
scale changed with the width of its heads would pass for rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.selection import Indices
from graphprune.errors import ShrinkError, TraceError
from graphprune.shrink.attributes import Candidate, choices, set_attributes
from graphprune.shrink.module import cut_module
from graphprune.shrink.program import Program, double, widen
from graphprune.shrink.resize import resize
from graphprune.shrink.weights import named_weights, select_weight
from graphprune.trace.caches import without_caches
from graphprune.trace.fx import trace_module

# Relative to the largest output. Graph and module run the same operators: all but rounding is a difference.
DOUBLE_TOLERANCE = 1e-10
TOLERANCE = 1e-5


def attributes_to_set(
    model: nn.Module, groups: NodeGroups, kept: Mapping[str, Indices], inputs: Mapping[str, Any]
) -> tuple[Candidate, ...]:
    """Return which attributes to set on a cut module, for it to compute what the shrunk graph does.

    Args:
        model: The module before surgery; it is not changed.
        groups: Its node groups.
        kept: Units that stay, by group name.
        inputs: Keyword arguments of its forward.

    Raises:
        ShrinkError: If no choice of attributes does; with what is wrong when none is set.
    """
    trial = _trial(model, Program(groups.graph.program), inputs)
    weights = {name: select_weight(name, item, groups, kept) for name, item in named_weights(trial.model)}
    expected = resize(trial.program, groups, kept)(weights, trial.inputs)
    del weights
    small = trial.model
    cut_module(small, groups, kept)
    problem = ""
    for choice in choices(model, groups, kept):
        before = set_attributes(small, choice)
        wrong = trial.difference(small, expected)
        set_attributes(small, before)
        if wrong is None:
            return _without_config(choice, trial, small, expected)
        problem = problem or wrong
    raise _does_not_follow(model, problem)


def _without_config(
    choice: tuple[Candidate, ...], trial: _Trial, small: nn.Module, expected: tuple[Tensor, ...]
) -> tuple[Candidate, ...]:
    """Leave the shared configuration out of a choice if no code reads it while it runs: it builds the model again."""
    rest = tuple(candidate for candidate in choice if not candidate.in_config)
    if rest == choice:
        return choice
    before = set_attributes(small, rest)
    wrong = trial.difference(small, expected)
    set_attributes(small, before)
    return choice if wrong else rest


@dataclass(frozen=True, slots=True)
class _Trial:
    """A model as it is compared with its program: its weights, and the arithmetic of both.

    Attributes:
        model: A copy, with the weights to compare on.
        program: What was traced.
        inputs: Keyword arguments of the forward.
        in_double: Whether all of it is in float64.
    """

    model: nn.Module
    program: Program
    inputs: Mapping[str, Any]
    in_double: bool

    def own_difference(self) -> str | None:
        """Return how the model itself differs from its program, or None."""
        return self.difference(self.model, self.program(dict(named_weights(self.model)), self.inputs))

    def difference(self, module: nn.Module, expected: tuple[Tensor, ...]) -> str | None:
        """Run a module; return what is wrong with it, or None."""
        if expected[0].is_meta:
            return _misfit(module, self.inputs, expected[0])
        try:
            ours = self._outputs(module)
        except (
            RuntimeError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            AssertionError,
        ) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        shapes = [tuple(output.shape) for output in ours], [tuple(output.shape) for output in expected]
        if shapes[0] != shapes[1]:
            return f"its outputs have the shapes {shapes[0]}, not {shapes[1]}"
        distance = max(_distance(output, reference) for output, reference in zip(ours, expected))
        tolerance = DOUBLE_TOLERANCE if self.in_double else TOLERANCE
        if distance <= tolerance:
            return None
        return f"its outputs are off by {distance:.1e} of their size (allowed {tolerance:.0e})"

    def _outputs(self, module: nn.Module) -> tuple[Tensor, ...]:
        with torch.no_grad(), without_caches(module), _Widened() if self.in_double else nullcontext():
            return tuple(leaf for leaf in tree_leaves(module(**self.inputs)) if isinstance(leaf, Tensor))


def _trial(model: nn.Module, program: Program, inputs: Mapping[str, Any]) -> _Trial:
    """Return the sharpest trial that the model passes before anything is cut off."""
    if any(tensor.is_meta for _, tensor in named_weights(model)):
        return _Trial(copy.deepcopy(model), program, inputs, in_double=False)
    problem: str | None = None
    for in_double in (True, False):
        for weights in (_livelier, Tensor.detach):
            twin = _with_weights(model, weights)
            trial = _Trial(twin, program, inputs, in_double=False)
            if in_double:
                trial = _Trial(
                    twin.double(), program.in_double(), tree_map(double, dict(inputs)), in_double=True
                )
            problem = trial.own_difference()
            if problem is None:
                return trial
    raise _does_not_follow(model, f"even before, it is not what was traced: {problem}")


def _with_weights(model: nn.Module, made: Callable[[Tensor], Tensor]) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(made(parameter))
    return twin


def _livelier(weight: Tensor) -> Tensor:
    """Return a weight whose products are about as large as what they are taken of, and which is not constant."""
    if not weight.is_floating_point() or weight.numel() < 2:
        return weight
    generator = torch.Generator().manual_seed(weight.numel())
    weight = weight.detach().double()
    if bool((weight == weight.flatten()[0]).all()):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight = weight + 0.05 * noise.to(weight.device)
    if weight.dim() < 2:
        return weight
    size = float(weight.square().mean().sqrt())
    return weight * max(
        1.0, weight.numel() ** -0.25 / size
    )  # of a square matrix, one over the root of its width


class _Widened(TorchDispatchMode):
    """Runs a module's own code with float64 wherever it names a float type, as `Program.in_double` does a graph's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))
        return (
            double(result) if func is torch.ops.aten.lift_fresh.default else result
        )  # a constant in the code


def _distance(output: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest number; infinity where one of them is none."""
    if not reference.numel():
        return 0.0
    apart = float((output.double() - reference.double()).abs().max())
    size = float(reference.double().abs().max())
    return apart / max(size, 1e-30) if apart == apart else float("inf")


def _misfit(module: nn.Module, inputs: Mapping[str, Any], expected: Tensor) -> str | None:
    """Trace a module without weights: there are shapes to compare, and no numbers."""
    try:
        found = trace_module(module, inputs, dynamic=False).outputs[0].shape
    except TraceError as error:
        return error.problem
    return None if found == tuple(expected.shape) else f"its output has the shape {found}"


def _does_not_follow(model: nn.Module, problem: str) -> ShrinkError:
    return ShrinkError(
        f"{type(model).__name__}'s own code does not follow its smaller weights: {problem}",
        "take the traced graph, shrink(..., form='graph'), or prune other kinds of groups",
    )
