"""A plan applied to a model: as a module where its own code follows, else as the traced graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn
from torch.export import ExportedProgram

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import ShrinkError, ShrinkWarning
from graphprune.shrink.attributes import set_attributes
from graphprune.shrink.config import describe
from graphprune.shrink.fitting import fitting_plan
from graphprune.shrink.follow import attributes_to_set
from graphprune.shrink.module import cut_module
from graphprune.shrink.plan import Plan
from graphprune.shrink.traced import shrink_graph
from graphprune.trace.inputs import keyword_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

Form = Literal["auto", "module", "graph"]


@overload
def shrink(
    model: nn.Module | ExportedProgram,
    groups: NodeGroups,
    plan: Plan | Mapping[str, Sequence[int]],
    example_inputs: Any = None,
    *,
    form: Form = "auto",
) -> nn.Module: ...
@overload
def shrink(
    model: ir.Model | str | Path | None, groups: NodeGroups, plan: Plan | Mapping[str, Sequence[int]]
) -> ir.Model: ...
def shrink(
    model: Any,
    groups: NodeGroups,
    plan: Plan | Mapping[str, Sequence[int]],
    example_inputs: Any = None,
    *,
    form: Form = "auto",
) -> Any:
    """Return a model without the units that a plan removes.

    Args:
        model: The model that `groups` were read off; it is not changed. For groups of an ONNX graph an
            `onnx_ir.Model`, the path of a file, or None for the model that was traced.
        groups: Its node groups.
        plan: Which units to remove: a plan, or numbers of units by group name.
        example_inputs: Keyword arguments of its forward to check the result on; by default those of the trace.
        form: ``module`` for a copy of the module, ``graph`` for the traced graph as a GraphModule; ``auto`` takes
            the module where it computes the same as the graph, and else warns why it does not.

    Returns:
        The smaller model: tied parameters stay tied, dtypes, devices and gradient flags stay as they were. Its
        configuration says the new sizes where one can; `graphprune.save` writes it in any case. Of an ONNX model it is
        an `onnx_ir.Model`; write it into another folder, for it may read the old one's external data.

    Raises:
        CouplingError: If the groups are of another model.
        ShrinkError: If the plan does not fit, an optimizer's gates are still on the model, a module was asked for and
            its own code does not follow, or an ONNX operator cannot be told of the new sizes.
    """
    plan = fitting_plan(plan, model, groups)
    kept = plan.kept(groups)
    if not isinstance(groups.graph.program, ExportedProgram):
        from graphprune.shrink.onnx import fitting_model, shrink_onnx

        if any(len(units) == 0 for units in kept.values()):
            raise ShrinkError(
                "the plan removes all units of a group, and an ONNX model keeps at least one",
                "keep one of them",
            )
        return shrink_onnx(fitting_model(model, groups), groups, kept)
    if form == "graph" or isinstance(model, ExportedProgram):
        return shrink_graph(model, groups, kept)
    inputs = keyword_inputs(model, example_inputs or _traced_inputs(groups))
    try:
        found = attributes_to_set(model, groups, kept, inputs)
        small = copy.deepcopy(model)
        cut_module(small, groups, kept)
        set_attributes(small, found)
        describe(small, model, groups, plan)
        return small
    except ShrinkError as error:
        if form == "module":
            raise
        traced = shrink_graph(model, groups, kept)
        traced.meta["why_a_graph"] = error.problem
        warnings.warn(f"the result is the traced graph: {error.problem}", ShrinkWarning, stacklevel=2)
        return traced


def _traced_inputs(groups: NodeGroups) -> Mapping[str, Any]:
    examples = groups.graph.program.example_inputs
    if not examples or examples[0]:
        raise ShrinkError(
            "the graph was traced without keyword arguments to check the result on",
            "give them: shrink(model, groups, plan, example_inputs)",
        )
    return dict(examples[1])
