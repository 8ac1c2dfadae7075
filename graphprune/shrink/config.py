"""A transformers configuration that builds the smaller model.

Which field of a configuration holds which width is not looked up by the model's class. Every width that changed is a
product of atoms; a field whose value is such a product is a candidate, and only a combination of candidates with which
the stock class builds exactly the smaller model's shapes, on the meta device, is taken.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from graphprune.coupling.groups import NodeGroups
from graphprune.errors import RefusedWidthsError, ShrinkError, UndescribedWidthsError
from graphprune.shrink.plan import Plan

Change = tuple[str, int, int]
Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = "head_dim"
"""What attention classes of transformers look up in a configuration before they divide the width by the heads."""
_MANY = 64  # combinations to build on the meta device


def fit_config(config: Any, model: nn.Module, groups: NodeGroups, plan: Plan) -> Any:
    """Return a configuration with which the stock class builds `model`'s shapes.

    Args:
        config: The original model's.
        model: The smaller model, adapters merged.
        groups: The node groups of the original.
        plan: What was removed: the same number of units from all groups of a kind and size.

    Raises:
        RefusedWidthsError: If the stock class refuses the choice of fields that does it.
        ShrinkError: If none does, as when layers have different widths.
    """
    wanted = _shapes(model)
    buffers = _buffers(model)
    resized, fitting = _candidates(config, _resizings(groups, plan)), None
    for choice in _choices(type(model), config, wanted, resized, _head_widths(config, groups)):
        changed = _changed(config, choice)
        built = _built(type(model), changed)
        if built is None or _shapes(built) != wanted:
            continue
        # As many heads as a head is wide: fewer and narrower ones have weights of one shape, and other rotary tables.
        if _buffers(built) == buffers:
            return _valid(changed)
        if all(field != HEAD_WIDTH for field, _, _ in choice):
            fitting = fitting or changed
    if fitting is not None:
        return _valid(fitting)
    raise UndescribedWidthsError(
        f"no setting of {type(config).__name__} describes the smaller model",
        "prune the same number of units from every layer, or other kinds; any layout per layer is opened by "
        "graphprune.load (recipe: prune.layout)",
    )


def _valid(config: Any) -> Any:
    """Return a configuration that can be saved: transformers checks it then."""
    try:
        config.validate()
    except Exception as error:  # huggingface_hub wraps what the class's own checks raise
        raise RefusedWidthsError(
            f"stock {type(config).__name__} refuses the smaller model's widths: {' '.join(str(error).split())}",
            "choose the widths of that kind by width_multiple, or another share to remove; any layout per layer is "
            "opened by graphprune.load (recipe: prune.width_multiple, prune.remove, prune.layout)",
        ) from error
    return config


def describe(small: Any, model: nn.Module, groups: NodeGroups, plan: Plan) -> None:
    """Let a smaller transformers model's configuration say its sizes, where it can: it then saves and loads.

    Args:
        small: The smaller model, whose configuration is changed in place; left as it is if no setting describes it.
        model: The original.
        groups: Its node groups.
        plan: What was removed.
    """
    if not plan or not isinstance(small, PreTrainedModel) or not _is_uniform(groups, plan):
        return
    try:
        fitted = fit_config(small.config, small, groups, plan)
    except ShrinkError:
        return  # layers of different widths, for one
    for old, new in _changed_numbers(model, small):  # a norm's eps grows with the units that it lost
        for field, value in fitted.to_dict().items():
            if isinstance(value, float) and value == old:
                setattr(fitted, field, new)
    if _builds(type(small), fitted, small):
        for field, value in fitted.to_dict().items():
            if getattr(small.config, field, value) != value:
                setattr(small.config, field, value)


def _changed_numbers(model: nn.Module, small: nn.Module) -> set[tuple[float, float]]:
    """Return (before, after) of the fractions that modules keep in attributes and surgery changed."""
    after = dict(small.named_modules())
    return {
        (value, vars(after[path])[name])
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and vars(after[path])[name] != value
    }


def _builds(kind: Any, config: Any, small: nn.Module) -> bool:
    """Whether a class builds from a valid configuration what `small` is, eps and scales of its modules included."""
    try:
        config.validate()
        with torch.device("meta"):
            built = dict(kind(config).named_modules())
    except Exception:  # a class says in its own way that a configuration is none
        return False
    return all(
        vars(built[path]).get(name) == value
        for path, module in small.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
    )


def _is_uniform(groups: NodeGroups, plan: Plan) -> bool:
    """Whether all groups of a kind and size lose the same number of units."""
    lost: dict[tuple[str, int], set[int]] = {}
    for group in groups.values():
        lost.setdefault((group.kind, group.size), set()).add(len(plan.get(group.name, ())))
    return all(len(counts) == 1 for counts in lost.values())


def _resizings(groups: NodeGroups, plan: Plan) -> set[tuple[int, int]]:
    """Return (before, after) of every width that changed: the atoms, and runs of factors that hold one."""
    selection = groups.selection(plan.kept(groups))
    found: set[tuple[int, int]] = set()
    for name in plan:
        group = groups[name]
        for member in group.members:
            axes = groups.axes(member.parameter)
            for factors in _runs(groups, axes[member.axis] if axes else group.atom):
                before = after = 1
                for factor in factors:
                    before *= factor.size
                    after *= len(groups.keep(factor, selection))
                if before != after:
                    found.add((before, after))
    return found


def _runs(groups: NodeGroups, layout: Any) -> Iterator[tuple[Any, ...]]:
    factors = groups.factors(layout)
    for start, end in itertools.combinations(range(len(factors) + 1), 2):
        yield tuple(factors[start:end])


def _candidates(config: Any, resizings: set[tuple[int, int]]) -> list[Change]:
    fields = {
        field: value
        for field, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and hasattr(config, field)
    }
    return [
        (field, old, new)
        for field, old in sorted(fields.items())
        for before, new in sorted(resizings)
        if before == old
    ]


def _useful(kind: Any, config: Any, wanted: Shapes, candidates: list[Change]) -> list[Change]:
    """Return the changes that may be part of the answer, those first that alone bring most weights to their shapes.

    Last come those that alone add weights or take some away: mostly another number of layers, by chance the same.
    """
    ranked: list[tuple[int, Change]] = []
    for change in candidates:
        built = _built(kind, _changed(config, (change,)))
        found = {} if built is None else _shapes(built)
        right = sum(found.get(name) == shape for name, shape in wanted.items())
        ranked.append((-right if built is None or found.keys() == wanted.keys() else 1, change))
    return [change for _, change in sorted(ranked, key=lambda pair: pair[0])]


def _head_widths(config: Any, groups: NodeGroups) -> list[Change]:
    """Return what the width of a head may be, where the configuration leaves it to the class to divide for it."""
    if getattr(config, HEAD_WIDTH, None) is not None:
        return []
    sizes = {
        math.prod(factor.size for factor in factors)
        for group in groups.values()
        if group.kind in ("attention_heads", "query_heads")
        for member in group.members
        for factors in _runs(
            groups, (groups.axes(member.parameter) or {member.axis: group.atom})[member.axis]
        )
    }
    return [(HEAD_WIDTH, 0, size) for size in sorted(sizes) if size > 1]


def _choices(
    kind: Any, config: Any, wanted: Shapes, candidates: list[Change], head_widths: list[Change]
) -> Iterator[tuple[Change, ...]]:
    """Yield combinations of changes, without a width of a head and with each, so many of either at most."""
    for width in (None, *head_widths):
        given = () if width is None else (width,)
        useful = _useful(kind, _changed(config, given), wanted, candidates)
        for choice in itertools.islice(_by_size(useful), _MANY):
            yield (*choice, *given)


def _changed(config: Any, choice: Iterable[Change]) -> Any:
    changed = copy.deepcopy(config)
    for field, _, after in choice:
        setattr(changed, field, after)
    return changed


def _by_size(candidates: list[Change]) -> Iterator[tuple[Change, ...]]:
    for count in range(1, min(len(candidates), 6) + 1):
        for choice in itertools.combinations(candidates, count):
            if len({field for field, _, _ in choice}) == count:
                yield choice


def _built(kind: Any, config: Any) -> nn.Module | None:
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config)
    except (ValueError, RuntimeError, TypeError, AttributeError, ZeroDivisionError):
        return None  # the class refuses this combination: not the one
    return model


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _buffers(model: nn.Module) -> Shapes:
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
