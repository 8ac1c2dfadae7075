"""Whether groups, a model and a plan are of one another, before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import CouplingError, ShrinkError
from graphprune.shrink.gated import is_gated
from graphprune.shrink.plan import Plan
from graphprune.shrink.weights import named_weights


def check_groups(groups: object) -> None:
    """Raise if `groups` are no node groups.

    Raises:
        CouplingError: If they are something else.
    """
    if not isinstance(groups, NodeGroups):
        raise CouplingError(
            f"a {type(groups).__name__} is not the node groups of a model",
            "give what node_groups returns: node_groups(trace(model, example_inputs))",
        )


def check_model(model: object, groups: NodeGroups) -> None:
    """Raise if `groups` were not read off `model`, as the names and shapes of its weights tell.

    Raises:
        CouplingError: If it is no model, or another one.
    """
    if not isinstance(groups.graph.program, ExportedProgram):
        from graphprune.shrink.onnx import fitting_model

        fitting_model(model, groups)
        return
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise CouplingError(
            f"a {type(model).__name__} is not the model that these groups were read off",
            "give the torch module, or the exported program, that was traced",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in named_weights(model)}
    for name, value in groups.graph.weights.items():
        if shapes.get(name) != value.shape:
            has = f"with shape {shapes[name]}" if name in shapes else "not at all"
            raise CouplingError(
                f"the node groups are of another model: they know '{name}' with shape {value.shape}, this one has it "
                f"{has}",
                "trace this very model, and take its groups",
            )


def fitting_plan(plan: Plan | Mapping[str, Any], model: object, groups: NodeGroups) -> Plan:
    """Return a plan that may be applied to a model; units by group name, as a dict, are a plan too.

    Raises:
        CouplingError: If the groups are of another model.
        ShrinkError: If the plan does not fit, or gates stand on the model.
    """
    check_groups(groups)
    check_model(model, groups)
    if isinstance(model, nn.Module) and is_gated(model):
        raise ShrinkError(
            "the model still has the gates of its pruning on it, which are no part of it",
            "call close() on the optimizer first (its plan stays), then shrink",
        )
    if not isinstance(plan, Mapping):
        raise ShrinkError(
            f"a {type(plan).__name__} is not a plan", "give Plan({group name: [numbers of units]})"
        )
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    plan.check(groups)
    return plan
