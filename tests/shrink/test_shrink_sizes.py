"""The shrunk graph leaves open what the trace left open: sizes that follow from the batch stay computed."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from zeroed import zeroed

from graphprune.coupling.groups import node_groups
from graphprune.shrink.model import shrink
from graphprune.shrink.plan import Plan
from graphprune.trace.model import trace


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(6, 24), nn.Linear(24, 4)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x):
        x = self.inward(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(6, 24), nn.Linear(24, 4)
        self.layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)

    def forward(self, x):
        return self.out(self.layer(self.inward(x)))


class Repeated(nn.Module):
    """A table of slopes, one a head, repeated for each of the batch, with the heads folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(6, 24), nn.Linear(24, 4)
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, x):
        batch, length = x.shape[:2]
        heads = self.inward(x).view(batch, length, 4, 6).transpose(1, 2).reshape(batch * 4, length, 6)
        folded = torch.tanh(heads) * self.slopes.repeat(batch).view(batch * 4, 1, 1)
        return self.out(folded.view(batch, 4, length, 6).transpose(1, 2).reshape(batch, length, 24))


def sam():
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=24,
        output_channels=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=40,
    )
    return SamVisionModel(config)


def numbers(name, *size):
    return {name: torch.randn(*size, dtype=torch.float64)}


def tokens(batch, length=11):
    return {"input_ids": torch.randint(0, 57, (batch, length))}


# A name, what builds the model, and inputs for a batch of any size and two lengths.
FOLDED = [
    ("multi-head attention", Attending, lambda batch, longer: numbers("x", batch, 9 if longer else 5, 6)),
    ("encoder layer", Encoding, lambda batch, longer: numbers("x", batch, 9 if longer else 5, 6)),
    ("repeated slopes", Repeated, lambda batch, longer: numbers("x", batch, 9 if longer else 5, 6)),
    ("bloom", ARCHITECTURES["bloom"].build, lambda batch, longer: tokens(batch, 13 if longer else 11)),
    ("deberta", ARCHITECTURES["deberta-v2"].build, lambda batch, longer: tokens(batch, 13 if longer else 11)),
    ("sam", sam, lambda batch, longer: numbers("pixel_values", batch, 3, 32, 32)),
]


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(("build", "inputs"), [case[1:] for case in FOLDED], ids=[case[0] for case in FOLDED])
def test_heads_that_are_folded_into_the_batch_go_at_every_batch(build, inputs):
    torch.manual_seed(0)
    model = build().double().eval()
    groups = node_groups(trace(model, inputs(2, False)))
    heads = [
        g for g in groups.prunable() if g.kind == "attention_heads" or (g.size == 4 and build is Repeated)
    ]
    assert heads
    plan = Plan({group.name: [1] for group in heads})
    small, reference = shrink(model, groups, plan, form="graph"), zeroed(model, groups, plan)
    with torch.no_grad():
        for batch, longer in ((2, False), (1, False), (5, True), (3, True)):
            given = inputs(batch, longer)
            ours, expected = first(small(**given)), first(reference(**given))
            torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)


def test_a_shrunk_graph_is_traced_and_shrunk_again():
    torch.manual_seed(0)
    model, inputs = Attending().double().eval(), numbers("x", 2, 5, 6)
    for left in (3, 2):
        groups = node_groups(trace(model, inputs))
        (name,) = [group.name for group in groups.prunable() if group.kind == "attention_heads"]
        plan = Plan({name: [0]})
        reference = zeroed(model, groups, plan)
        model = shrink(model, groups, plan, form="graph")
        other = numbers("x", 4, 7, 6)
        assert groups[name].size == left + 1
        with torch.no_grad():
            torch.testing.assert_close(model(**other), reference(**other), atol=1e-10, rtol=1e-8)
