"""A model with gates on it: no second optimizer, and no surgery, before the first one is closed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lhspg_bench import IDS, adapted_llama, llama_groups, units_of
from torch import nn

import graphprune as gp
from graphprune.errors import ShrinkError, TrainingError
from graphprune.prune.cubic_schedule import CubicSchedule

MAKERS = {
    "LHSPG": gp.LHSPG,
    "LHSPG in paper mode": partial(gp.LHSPG, mode="paper"),
    "LoRAPrune": partial(gp.LoRAPrune, schedule=CubicSchedule(4, every=1)),
}


def made(kind, model, **options):
    units = units_of(llama_groups())
    return MAKERS[kind](gp.param_groups(model, llama_groups()), **{"units": units, **options})


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("first", ["LHSPG", "LoRAPrune"])
@pytest.mark.parametrize("second", MAKERS)
def test_a_second_optimizer_is_refused_until_the_first_is_closed(first, second):
    model = adapted_llama()
    optimizer = made(first, model)
    before = hooks(model)
    with pytest.raises(TrainingError, match=r"gates of another optimizer on it[^→]*\n.*close\(\)"):
        made(second, model)
    assert hooks(model) == before
    optimizer.close()
    made(second, model).close()


def test_an_optimizer_that_could_not_be_made_is_not_in_the_way_of_the_next():
    model = adapted_llama()
    with pytest.raises(TrainingError, match="scores has no"):
        made("LHSPG", model, scores={"nothing": torch.zeros(1)})
    made("LHSPG", model).close()


@pytest.mark.parametrize("kind", ["LHSPG", "LoRAPrune"])
@pytest.mark.parametrize("form", ["auto", "module", "graph"])
def test_surgery_waits_for_close(kind, form):
    model, groups = adapted_llama(), llama_groups()
    optimizer = made(kind, model)
    plan = gp.Plan({name: range(count) for name, count in units_of(groups).items()})
    with pytest.raises(ShrinkError, match=r"gates of its pruning on it[^→]*\n.*call close\(\)"):
        gp.shrink(model, groups, plan, form=form)
    optimizer.close()
    small = gp.shrink(model, groups, plan, form=form)
    assert small(input_ids=IDS, use_cache=False)[0].shape[:2] == IDS.shape


def test_hooks_of_others_are_no_gates():
    model, groups = adapted_llama(), llama_groups()
    model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(lambda *_: None)
    plan = gp.Plan({name: range(count) for name, count in units_of(groups).items()})
    made("LHSPG", model).close()
    assert isinstance(gp.shrink(model, groups, plan, form="module"), nn.Module)
