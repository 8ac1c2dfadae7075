"""Sizes that a module's own code keeps in attributes: head counts, head widths, numbers of experts.

Which attribute holds which size is not looked up by the class. A whole-number attribute that equals a size which
changed near it is a candidate; which candidates are right is found by running the module against the shrunk graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graphprune.coupling.groups import NodeGroups
from graphprune.coupling.layout import Layout
from graphprune.coupling.selection import Indices, Selection

_MANY = 96  # choices to try


@dataclass(frozen=True, slots=True)
class Candidate:
    """One attribute of all modules of a class, and what it could become.

    Attributes:
        kind: The modules' class, or that of the configuration that modules share.
        attribute: Its name.
        changes: (module's qualified name, new value) wherever it would change.
        in_config: Whether the attribute is the configuration's.
    """

    kind: type
    attribute: str
    changes: tuple[tuple[str, int], ...]
    in_config: bool = False


def choices(
    model: nn.Module, groups: NodeGroups, kept: Mapping[str, Indices]
) -> Iterator[tuple[Candidate, ...]]:
    """Yield which attributes to change, the likeliest first: none, all, all but some, some.

    Args:
        model: The module before surgery.
        groups: Its node groups.
        kept: Units that stay, by group name.
    """
    found = _candidates(model, groups, groups.selection(kept))
    by_attribute: dict[tuple[type, str], list[Candidate]] = {}
    for candidate in found:
        by_attribute.setdefault((candidate.kind, candidate.attribute), []).append(candidate)
    slots = list(by_attribute.values())
    yield ()
    ordered = sorted(
        itertools.islice(itertools.product(*([*slot, None] for slot in slots)), 4096),
        key=lambda choice: sum(item is None for item in choice),
    )
    for choice in ordered[:_MANY]:
        chosen = tuple(item for item in choice if item is not None)
        if chosen:
            yield chosen


def set_attributes(model: nn.Module, chosen: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Set the attributes of a choice; return the choice that sets them back."""
    before = []
    for candidate in chosen:
        old = []
        for path, value in candidate.changes:
            module: Any = model.get_submodule(path)
            holder = module.config if candidate.in_config else module
            old.append((path, getattr(holder, candidate.attribute)))
            setattr(holder, candidate.attribute, value)
        before.append(replace(candidate, changes=tuple(old)))
    return tuple(before)


def _candidates(model: nn.Module, groups: NodeGroups, selection: Selection) -> list[Candidate]:
    sizes = _changed_sizes(groups, selection)
    found: dict[tuple[type, str, Any, bool], list[tuple[str, int]]] = {}
    for path, holder, in_config in _holders(model):
        near = {
            (label[0].removeprefix(f"{path}." if path else ""), *label[1:]): change
            for label, change in sizes.items()
            if in_config or _is_near(path, label[0])
        }
        for attribute, value in list(vars(holder).items()):
            if isinstance(value, int) and not isinstance(value, bool) and not attribute.startswith("_"):
                for label, (before, after) in near.items():
                    if before == value:
                        found.setdefault((type(holder), attribute, label, in_config), []).append(
                            (path, after)
                        )
    distinct = {
        (kind, attribute, tuple(changes), in_config): None
        for (kind, attribute, _, in_config), changes in found.items()
    }
    return [Candidate(*key) for key in distinct]


def _holders(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Yield the modules whose attributes their own code may read, and the configurations that they share."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        yield path, module, False
        config = vars(module).get("config")
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield path, config, True


def _is_near(module: str, weight: str) -> bool:
    """Whether a weight belongs to a module, its children or grandchildren."""
    prefix = f"{module}." if module else ""
    return weight.startswith(prefix) and weight.removeprefix(prefix).count(".") <= 2


def _changed_sizes(
    groups: NodeGroups, selection: Selection
) -> dict[tuple[str, int, int, int], tuple[int, int]]:
    """Return (before, after) of every run of factors, of every segment of every axis, that changes."""
    changed: dict[tuple[str, int, int, int], tuple[int, int]] = {}
    for name, value in groups.graph.weights.items():
        for dim, axis in enumerate(groups.axes(name) or ()):
            runs = [(axis,), *_runs(groups, axis)]
            for segment in groups.segments(axis):
                runs += [(segment,), *_runs(groups, segment)]
            for number, run in enumerate(runs):
                before = after = 1
                for factor in run:
                    before *= factor.size
                    after *= len(groups.keep(factor, selection))
                if before != after:
                    changed[name, dim, number, len(value.shape)] = (before, after)
    return changed


def _runs(groups: NodeGroups, layout: Layout) -> Iterator[tuple[Layout, ...]]:
    factors = groups.factors(layout)
    for start, end in itertools.combinations(range(len(factors) + 1), 2):
        yield tuple(factors[start:end])
