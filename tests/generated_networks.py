"""Random networks: a frozen description, and the module that it stands for.

A network is a directed acyclic graph: its nodes take earlier values, merge them and run a block. Everything follows
from the description, weights included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from generated_attention import Attention, Tables
from generated_blocks import Block
from torch import Tensor, nn

BATCH, FEATURES, TOKENS, OUTPUTS = 2, 4, 11, 3
Merge = Literal["first", "sum", "product", "concat"]


@dataclass(frozen=True)
class Node:
    """One step.

    Attributes:
        sources: Positions of earlier values; 0 is the embedded input.
        merge: How several of them become one.
        block: What runs on the merged value.
        residual: Whether the merged value is added to the block's result.
        shares: Position of an earlier node whose weights this one uses again.
    """

    sources: tuple[int, ...]
    merge: Merge
    block: Block
    residual: bool
    shares: int | None = None


@dataclass(frozen=True)
class Network:
    """A whole network.

    Attributes:
        tokens: Whether the input is token numbers, looked up in a table, or features through a linear map.
        tied: Whether the output reuses that table; needs `tokens`, and a last value of the embedded width.
        width: Of the embedded input.
        nodes: In an order in which they can run.
        length: Of the sequence.
        seed: Of weights and inputs.
    """

    tokens: bool
    tied: bool
    width: int
    nodes: tuple[Node, ...]
    length: int
    seed: int

    @property
    def widths(self) -> list[int]:
        """Width of every value."""
        widths = [self.width]
        for node in self.nodes:
            widths.append(node.block.outgoing(merged_width([widths[i] for i in node.sources], node.merge)))
        return widths

    @property
    def leaves(self) -> list[int]:
        """Values that no node reads: the network's output is made of them."""
        read = {source for node in self.nodes for source in node.sources}
        return [value for value in range(len(self.nodes) + 1) if value not in read]


def merged_width(widths: list[int], merge: Merge) -> int:
    return sum(widths) if merge == "concat" else widths[0]


def build(network: Network, name: Callable[[int], str] = "node{}".format) -> nn.Module:
    """Return the module in float64, its weights random; `name` gives its nodes their names."""
    model = Generated(network, name)
    generator = torch.Generator().manual_seed(network.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.data = 1 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
    return model.double().eval()


def inputs_of(network: Network, batch: int = BATCH, length: int | None = None) -> dict[str, Tensor]:
    """Return example inputs of a network's module."""
    generator = torch.Generator().manual_seed(network.seed + 1)
    shape = (batch, length or network.length)
    if network.tokens:
        return {"x": torch.randint(0, TOKENS, shape, generator=generator)}
    return {"x": torch.randn((*shape, FEATURES), generator=generator, dtype=torch.float64)}


class Generated(nn.Module):
    """The module that a description stands for."""

    def __init__(self, network: Network, name: Callable[[int], str]) -> None:
        super().__init__()
        self.network = network
        self.embed = (
            nn.Embedding(TOKENS, network.width) if network.tokens else nn.Linear(FEATURES, network.width)
        )
        self.names: list[str] = []
        widths = network.widths
        for position, node in enumerate(network.nodes):
            own = name(position) if node.shares is None else self.names[node.shares]
            self.names.append(own)
            if node.shares is None:
                incoming = merged_width([widths[source] for source in node.sources], node.merge)
                self.add_module(own, node.block.module(incoming))
        self.head = nn.Linear(
            sum(widths[leaf] for leaf in network.leaves), TOKENS if network.tied else OUTPUTS
        )
        if network.tied:
            self.head.weight = self.embed.weight
        turned = {node.block.turned for node in network.nodes if isinstance(node.block, Attention)} - {0}
        self.turned = sorted(turned)
        for width in self.turned:
            self.register_buffer(f"frequencies{width}", 10.0 ** -torch.linspace(0, 1, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.embed(x)]
        tables = self._tables(x.shape[1])
        for name, node in zip(self.names, self.network.nodes):
            merged = _merged([values[source] for source in node.sources], node.merge)
            module = self.get_submodule(name)
            result = module(merged, tables) if isinstance(node.block, Attention) else module(merged)
            values.append(merged + result if node.residual else result)
        return self.head(torch.cat([values[leaf] for leaf in self.network.leaves], -1))

    def _tables(self, length: int) -> Tables:
        """Cosines and sines that all layers share."""
        positions = torch.arange(length)
        angles = {
            width: positions[:, None] * self.get_buffer(f"frequencies{width}")[None, :]
            for width in self.turned
        }
        return {width: (angle.cos(), angle.sin()) for width, angle in angles.items()}


def _merged(values: list[Tensor], merge: Merge) -> Tensor:
    if merge == "concat":
        return torch.cat(values, -1)
    result = values[0]
    for value in values[1:] if merge != "first" else []:
        result = result + value if merge == "sum" else result * value
    return result
