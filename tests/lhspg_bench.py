"""Small models with adapters and LHSPG on them, traced once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama, traced
from torch import Tensor, nn

import graphprune as gp
from graphprune.coupling.groups import NodeGroups
from graphprune.prune.training import Objective, logits_of
from graphprune.source.adapters import attach_adapters

IDS = torch.arange(48).reshape(4, 12) % 60 + 3


def adapted_llama() -> Any:
    return attach_adapters(tiny_llama(seed=5), rank=2, alpha=4)


@cache
def llama_groups() -> NodeGroups:
    return traced(adapted_llama()).groups


def units_of(groups: NodeGroups, ffn: int = 8, heads: int = 1) -> dict[str, int]:
    counts = {"ffn": ffn, "attention_heads": heads}
    return {name: counts[group.kind] for name, group in groups.items() if group.kind in counts}


class Bench:
    """A tiny Llama with adapters, and LHSPG on its channels and heads."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, ffn: int = 8, heads: int = 1, **options: Any
    ) -> None:
        self.model = adapted_llama().to(dtype)
        self.groups = llama_groups()
        self.units = units_of(self.groups, ffn, heads)
        self.adapters = [p for p in self.model.parameters() if p.requires_grad]
        settings = {
            "lr": 1e-2,
            "warmup_steps": 2,
            "periods": 2,
            "period_steps": 3,
            "units": self.units,
            **options,
        }
        self.optimizer = gp.LHSPG(gp.param_groups(self.model, self.groups), **settings)
        self.loss = Objective(logits_of(self.model), None, 0.0, False)

    def steps(self, count: int, accumulate: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            for ids in IDS.chunk(accumulate):
                (self.loss(ids) / accumulate).backward()
            self.optimizer.step()

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def produced(self, name: str) -> list[tuple[nn.Parameter, int, Any]]:
        """Return the weights that produce a group's units, with the axis and the owner of each row."""
        group = self.groups[name]
        return [
            (self.model.get_parameter(member.parameter), member.axis, group.owner(member))
            for member in group.members
            if member.side != "consumes" and member.role == "parameter"
        ]


class Net(nn.Module):
    """Two layers with biases, 24 units between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


INPUTS = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}


@cache
def net_groups() -> NodeGroups:
    return gp.node_groups(gp.trace(Net(), INPUTS))


def adapted_net(bias: str = "all") -> Any:
    """The net with LoRA of rank 2 on both layers."""
    torch.manual_seed(1)
    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["up", "down"], bias=bias))


@cache
def adapted_net_groups() -> NodeGroups:
    return gp.node_groups(gp.trace(adapted_net(), INPUTS))


def width_of(groups: NodeGroups) -> str:
    (name,) = (name for name, group in groups.items() if group.kind == "ffn")
    return name


class Driven:
    """LHSPG on the net, its gates' gradients given by hand."""

    def __init__(self, units: int, **options: Any) -> None:
        self.model, groups = Net(), net_groups()
        self.name = width_of(groups)
        params = gp.param_groups(self.model, groups, kinds=["ffn"])
        self.optimizer = gp.LHSPG(params, units={self.name: units}, **options)

    def step(self, gradient: Tensor) -> None:
        if self.optimizer.gates.values:
            self.gate.grad = gradient
        self.optimizer.step()

    @property
    def gate(self) -> nn.Parameter:
        return self.optimizer.gates.values[self.name]
