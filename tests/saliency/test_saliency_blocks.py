"""Block influence against ShortGPT's formula in numpy, and how many blocks go for a share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama
from torch import nn

from graphprune.errors import BudgetError, TrainingError
from graphprune.prune.blocks import choose_blocks, drop_least_influential
from graphprune.saliency.blocks import block_influence

BATCHES = [torch.arange(20).reshape(2, 10) + 3, torch.arange(24).reshape(3, 8) + 30]


def reference(model, batches, masks=None):
    """1 − mean cosine in float64, token by token; the last block's output is taken in front of the final norm."""
    sums, count = 0, 0
    for place, ids in enumerate(batches):
        states, last = [], []
        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, seen=states: seen.append(inputs[0]))
            for layer in model.model.layers
        ]
        handles.append(
            model.model.norm.register_forward_pre_hook(lambda _, inputs, seen=last: seen.append(inputs[0]))
        )
        mask = None if masks is None else masks[place]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        for handle in handles:
            handle.remove()
        hidden = np.stack([state.double().numpy() for state in (*states, *last)])
        before, after = hidden[:-1], hidden[1:]
        cosines = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
        weight = np.ones(ids.shape) if mask is None else mask.numpy()
        sums, count = sums + (cosines * weight).sum((1, 2)), count + weight.sum()
    return 1 - sums / count


def test_influence_is_one_minus_the_mean_cosine():
    model = tiny_llama(num_hidden_layers=3)
    found = block_influence(model, BATCHES)
    np.testing.assert_allclose(found, reference(model, BATCHES), atol=1e-10)
    np.testing.assert_allclose(found, block_influence(model, BATCHES[::-1]), atol=1e-12)


def test_tokens_that_the_mask_hides_do_not_count():
    model = tiny_llama(num_hidden_layers=3)
    masks = [torch.ones_like(ids) for ids in BATCHES]
    masks[0][0, 7:] = 0
    masks[1][1, 3:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(BATCHES, masks)]
    found = block_influence(model, batches)
    np.testing.assert_allclose(found, reference(model, BATCHES, masks), atol=1e-10)


def test_a_block_that_only_scales_has_no_influence_and_one_that_reverses_has_two():
    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Times(3.0), Times(-0.5), Times(1.0)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    found = block_influence(Net(), [torch.randn(4, 7)])
    np.testing.assert_allclose(found, [0, 2, 0], atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = tiny_llama(attention_dropout=0.5).train()
    first = block_influence(model, BATCHES)
    assert torch.equal(first, block_influence(model, BATCHES))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_text_and_numbers_that_are_none_are_named():
    model = tiny_llama()
    with pytest.raises(TrainingError, match="empty"):
        block_influence(model, [])
    with pytest.raises(TrainingError, match="empty"):
        drop_least_influential(model, [], 0.2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(TrainingError, match=r"block 1 of 'model.layers' is not finite"):
        block_influence(model, BATCHES)


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 50)), min_size=2, max_size=9),
    st.integers(0, 60),
    st.floats(0.01, 0.99),
)
def test_the_number_of_blocks_is_the_nearest(blocks, other, remove):
    influence = torch.tensor([score for score, _ in blocks], dtype=torch.float64)
    parameters = [count for _, count in blocks]
    total = sum(parameters) + other
    ascending = sorted(range(len(blocks)), key=lambda block: (blocks[block][0], block))
    gone = {n: sum(parameters[block] for block in ascending[:n]) / total for n in range(1, len(blocks))}
    nearest = min(abs(share - remove) for share in gone.values())
    if nearest > max(parameters) / total / 2 + 1e-6:
        with pytest.raises(BudgetError, match="the nearest is"):
            choose_blocks(influence, parameters, total, remove)
    elif nearest < max(parameters) / total / 2 - 1e-6:
        chosen = choose_blocks(influence, parameters, total, remove)
        assert set(chosen) == set(ascending[: len(chosen)])
        assert abs(gone[len(chosen)] - remove) == pytest.approx(nearest)


def test_the_least_influential_blocks_go():
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad():  # all but deaf: their outputs are their inputs
        for number in (1, 3):
            model.model.layers[number].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[number].mlp.down_proj.weight.mul_(1e-3)
    share = sum(weight.numel() for weight in model.model.layers[0].parameters()) / model.num_parameters()
    dropped = drop_least_influential(model, BATCHES, 2 * share + 0.01)
    assert dropped.blocks == (1, 3)
    assert dropped.removed_share == pytest.approx(2 * share)
    assert dropped.model.config.num_hidden_layers == 2
    with torch.no_grad():
        ours, theirs = (each(input_ids=BATCHES[0]).logits for each in (dropped.model, model))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 0.05
    with pytest.raises(BudgetError, match="cannot be removed by whole blocks"):
        drop_least_influential(model, BATCHES, share / 3)
    with pytest.raises(BudgetError, match="one block"):
        choose_blocks(torch.ones(1), [4], 8, 0.5)
