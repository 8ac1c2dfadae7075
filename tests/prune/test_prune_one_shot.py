"""One shot from Python: the share asked for goes, what is least goes first, and the model it was given stays."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import randomized, tiny_llama
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import graphprune as gp
from graphprune.coupling.groups import node_groups
from graphprune.errors import BudgetError, TrainingError
from graphprune.prune.one_shot import prune_one_shot
from graphprune.saliency.gates import Gates
from graphprune.shrink.model import shrink
from graphprune.source.adapters import attach_adapters
from graphprune.trace.model import trace

IDS = torch.randint(3, 60, (6, 24), generator=torch.Generator().manual_seed(0))
LABELLED = [{"input_ids": ids, "labels": ids} for ids in IDS.split(1)]


def groups_of(model, inputs):
    return node_groups(trace(model, inputs))


@pytest.fixture(scope="module")
def llama():
    model = tiny_llama(seed=4)
    return model, groups_of(model, {"input_ids": IDS[:2]})


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("saliency", ["wanda", "flap", "magnitude", "random", "fisher", "taylor", "surgeon"])
@pytest.mark.parametrize("kinds", [("ffn",), ("ffn", "attention_heads")])
def test_the_share_that_was_asked_for_goes(llama, saliency, kinds):
    model, groups = llama
    pruned = prune_one_shot(model, groups, LABELLED, remove=0.2, saliency=saliency, kinds=kinds)
    assert parameters(model) == pruned.budget.before
    assert parameters(pruned.model) == pruned.budget.after
    assert 0.17 < pruned.budget.removed_share < 0.23
    assert {name: len(units) for name, units in pruned.plan.items()} == dict(pruned.budget.removed_units)
    assert {groups[name].kind for name in pruned.plan} <= set(kinds)
    assert torch.isfinite(pruned.model(input_ids=IDS).logits).all()


def test_channels_go_that_have_the_least_activation_times_weight(llama):
    """Against Wanda's formula on activations that the test records itself, in float64."""
    model, groups = llama
    pruned = prune_one_shot(model, groups, LABELLED, remove=0.2, repair="none", layout="per_layer")
    for name, units in pruned.plan.items():
        (member,) = (member for member in groups[name].consumers if member.role == "parameter")
        layer = model.get_submodule(member.parameter.removesuffix(".weight"))
        seen = []
        handle = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=IDS)
        handle.remove()
        norms = seen[0].flatten(0, -2).double().square().sum(0).sqrt()
        scores = (layer.weight.detach().double().abs() * norms).sum(0)
        owner = torch.from_numpy(groups[name].owner(member))
        by_unit = torch.zeros(groups[name].size, dtype=torch.float64).index_add_(0, owner, scores)
        assert sorted(units) == sorted(by_unit.argsort()[: len(units)].tolist())


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_stays_as_it_was(adapted):
    """Its weights, gradients, and what trains; adapters are no part of the share."""
    model = tiny_llama(seed=5)
    base = parameters(model)
    if adapted:
        model = attach_adapters(model, rank=2, alpha=4)
    groups = groups_of(model, {"input_ids": IDS[:2]})
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    first = next(model.parameters())
    kept = copy.deepcopy(
        {name: (p.detach(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    )
    for saliency in ("wanda", "fisher"):
        pruned = prune_one_shot(model, groups, LABELLED, remove=0.15, saliency=saliency)
        assert pruned.budget.before == base
    assert first is next(model.parameters())
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        weight, trainable, gradient = kept[name]
        assert torch.equal(parameter, weight)
        assert parameter.requires_grad == trainable
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    shapes = {name: p.requires_grad for name, p in pruned.model.named_parameters()}
    assert shapes == {name: trainable for name, (_, trainable, _) in kept.items()}


@pytest.mark.parametrize("repair", ["least_squares", "bias"])
def test_a_repair_comes_nearer_to_the_whole_model_than_none(llama, repair):
    """On calibration text; and what is repaired differs from what is not in weights that read units alone."""
    model, groups = llama
    outputs = {}
    for name in ("none", repair):
        pruned = prune_one_shot(model, groups, LABELLED, remove=0.1, repair=name)
        layer = pruned.model.model.layers[0].mlp.down_proj
        with torch.no_grad():
            outputs[name] = (layer.weight, pruned.model(input_ids=IDS).logits)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    assert (outputs[repair][1] - whole).norm() < (outputs["none"][1] - whole).norm()
    assert torch.equal(outputs[repair][0], outputs["none"][0]) == (repair == "bias")


def test_without_a_repair_it_is_the_model_with_those_gates_shut(llama):
    model, groups = llama
    pruned = prune_one_shot(model, groups, LABELLED, remove=0.2, repair="none")
    gates = Gates(model, groups, pruned.plan)
    with torch.no_grad():
        for name, units in pruned.plan.items():
            gates.values[name][list(units)] = 0
        masked = model(input_ids=IDS).logits
    gates.close()
    torch.testing.assert_close(pruned.model(input_ids=IDS).logits, masked, atol=1e-5, rtol=1e-4)
    again = shrink(model, groups, pruned.plan)
    assert torch.equal(again(input_ids=IDS).logits, pruned.model(input_ids=IDS).logits)


def test_an_encoder_is_judged_by_its_own_loss():
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=67
    )
    model = randomized(BertForSequenceClassification(config), 1)
    mask = torch.ones_like(IDS[:2])
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])} for ids in IDS.split(2)
    ]
    groups = groups_of(model, {"input_ids": IDS[:2], "attention_mask": mask})
    pruned = prune_one_shot(model, groups, batches, remove=0.1, saliency="fisher")
    assert parameters(pruned.model) == pruned.budget.after < pruned.budget.before


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_a_plain_network_is_judged_by_the_loss_that_is_given():
    """A unit that nothing of the loss depends on goes before all others."""
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.down.weight[0, 7] = model.down.weight[1, 7] = 0  # unit 7 reaches the third output alone
        model.down.weight[2, 7] = 9
    batches = [torch.randn(16, 6) for _ in range(4)]
    groups = groups_of(model, batches[0])
    kinds = {group.kind for group in groups.values() if group.prunable}
    settings = {"remove": 0.03, "saliency": "fisher", "kinds": kinds}
    by_two = prune_one_shot(
        model, groups, batches, loss=lambda out: out[:, :2].square().mean(), **settings
    ).plan
    by_three = prune_one_shot(model, groups, batches, loss=lambda out: out.square().mean(), **settings).plan
    (units,), (others,) = by_two.values(), by_three.values()
    assert 7 in units
    assert 7 not in others


def test_what_cannot_be_done_is_refused_and_the_model_stays(llama):
    model, groups = llama
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = [{"input_ids": ids} for ids in IDS.split(1)]
    with pytest.raises(TrainingError, match=r"gradients of the loss.*\n.*labels"):
        prune_one_shot(model, groups, plain, remove=0.2, saliency="fisher")
    with pytest.raises(TrainingError, match="calibration set is empty"):
        prune_one_shot(model, groups, remove=0.2)
    with pytest.raises(TrainingError, match=r"but one window or batch"):
        prune_one_shot(model, groups, plain[:1], remove=0.2)
    with pytest.raises(TrainingError, match="there is none"):
        prune_one_shot(model, groups, remove=0.2, saliency="magnitude")
    with pytest.raises(TrainingError, match="there is none"):
        prune_one_shot(model, groups, remove=0.2, saliency="magnitude", repair="bias")
    with pytest.raises(BudgetError, match="cannot be removed"):
        prune_one_shot(model, groups, plain, remove=0.95)
    with pytest.raises(BudgetError, match=r"there is no layout 'perlayer'\n.*per_layer"):
        prune_one_shot(model, groups, plain, remove=0.2, layout="perlayer")
    gates = Gates(model, groups, [name for name, group in groups.items() if group.kind == "ffn"])
    with pytest.raises(TrainingError, match="close"):
        prune_one_shot(model, groups, plain, remove=0.2)
    gates.close()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert prune_one_shot(model, groups, remove=0.2, saliency="magnitude", repair="none").plan


def test_the_same_repair_stands_in_while_units_fade_in_a_loop_of_ones_own():
    """What the gated model with its stand-ins computes in the end, the model that is cut computes by its weights."""
    model = attach_adapters(tiny_llama(seed=6), rank=2, alpha=4)
    groups = groups_of(model, {"input_ids": IDS[:2]})
    repairs = []
    optimizer = gp.LHSPG(
        gp.param_groups(model, groups, "ffn"),
        lr=1e-2,
        remove=0.1,
        warmup_steps=1,
        periods=2,
        period_steps=2,
        on_period=lambda: repairs[0].update(optimizer.redundant),
    )
    calibration = gp.Calibration.of_batches(LABELLED, lambda batch: model(**batch))
    repairs.append(gp.LeastSquares(model, optimizer.gates, calibration))
    for _ in range(optimizer.schedule_steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    with torch.no_grad():
        repaired = model(input_ids=IDS).logits
    optimizer.close()
    small = repairs[0].cut(optimizer.plan, lambda: gp.shrink(model, groups, optimizer.plan))
    without = gp.shrink(model, groups, optimizer.plan)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=IDS).logits, repaired, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(without(input_ids=IDS).logits, repaired, atol=1e-3)
