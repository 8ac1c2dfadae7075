"""Covariances of the inputs that a router sends to each expert of a stack, on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quant.calibration import Batch, call, evaluation
from quant.errors import QuantError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertInputs:
    """What the experts of one stack were given.

    Attributes:
        covariance: float32 (experts, columns, columns): the sum of ``x^T x`` over the inputs of each.
        tokens: int64 (experts,): how many inputs each had.
    """

    covariance: Tensor
    tokens: Tensor


def collect_expert_inputs(
    model: nn.Module, batches: Iterable[Batch], names: Iterable[str]
) -> dict[str, ExpertInputs]:
    """Run a model and sum up what each expert of its stacked parameters gets.

    Experts are seen where the forward calls ``linear(inputs, parameter[expert])``, as those of transformers 5 do
    with ``experts_implementation="eager"``.

    Args:
        model: Run in evaluation mode without gradients.
        batches: What it is called with, in turn.
        names: Qualified names of parameters (experts, rows, columns).

    Returns:
        The inputs by name.

    Raises:
        QuantError: There is no such stack, or the forward does not read it expert by expert.
    """
    stacks = {name: _stack(model, name) for name in names}
    found = {name: _nothing_yet(stack) for name, stack in stacks.items()}
    with evaluation(model), torch.no_grad(), _Watch(stacks, found):
        for batch in batches:
            call(model, batch)
    for name, inputs in found.items():
        if not inputs.tokens.any():
            raise QuantError(
                f"no expert of {name} was given to linear() by itself",
                "pass a batch at least, and let the forward read experts one by one "
                "(transformers: experts_implementation='eager')",
            )
    return found


class _Watch(TorchFunctionMode):
    """Sees every call of `linear`, and knows the experts by where their weights lie in memory."""

    def __init__(self, stacks: Mapping[str, Tensor], found: Mapping[str, ExpertInputs]) -> None:
        super().__init__()
        self._experts: dict[int, tuple[ExpertInputs | None, int]] = {
            stack[expert].data_ptr(): (found[name], expert)
            for name, stack in stacks.items()
            for expert in range(len(stack))
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and len(args) > 1:
            inputs, expert = self._experts.get(args[1].data_ptr(), (None, 0))
            if inputs is not None:
                rows = args[0].detach().reshape(-1, args[0].shape[-1]).to(torch.float32)
                inputs.covariance[expert].addmm_(rows.T, rows)
                inputs.tokens[expert] += len(rows)
        return func(*args, **(kwargs or {}))


def _stack(model: nn.Module, name: str) -> Tensor:
    stack = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if stack is None or stack.dim() != 3:
        found = "nothing" if stack is None else f"of shape {tuple(stack.shape)}"
        raise QuantError(f"{name} is {found}, not a stack of experts", "name a parameter of three axes")
    return stack.detach()


def _nothing_yet(stack: Tensor) -> ExpertInputs:
    experts, _, columns = stack.shape
    return ExpertInputs(
        covariance=torch.zeros(experts, columns, columns, device=stack.device),
        tokens=torch.zeros(experts, dtype=torch.int64, device=stack.device),
    )
