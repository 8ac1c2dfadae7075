"""Hypothesis strategies for the networks of `generated_networks`."""

from __future__ import annotations

import itertools
from dataclasses import replace

from generated_attention import Attention
from generated_blocks import Activation, Block, Convolution, Cut, Gated, Ladder, Linear, Norm, Rearranged
from generated_networks import Merge, Network, Node, merged_width
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# None is the batch (2), a length (5 or 7), the number of features, tokens or outputs.
WIDTHS = (6, 8, 9, 10, 12, 15, 16, 18)
SMALL_WIDTHS = (6, 8, 9)


@st.composite
def networks(draw: DrawFn, most_nodes: int = 5, widths: tuple[int, ...] = WIDTHS) -> Network:
    """Networks of up to `most_nodes` nodes over values of `widths` and what follows from them."""
    tokens = draw(st.booleans())
    network = Network(
        tokens,
        False,
        draw(st.sampled_from(widths)),
        (),
        draw(st.sampled_from([5, 7])),
        draw(st.integers(0, 99)),
    )
    for _ in range(draw(st.integers(1, most_nodes))):
        network = replace(network, nodes=(*network.nodes, draw(_nodes(network, widths))))
    tied = tokens and sum(network.widths[leaf] for leaf in network.leaves) == network.width
    return replace(network, tied=tied and draw(st.booleans()))


@st.composite
def _nodes(draw: DrawFn, network: Network, widths: tuple[int, ...]) -> Node:
    have = network.widths
    first = draw(st.integers(0, len(have) - 1).map(lambda back: len(have) - 1 - back))
    merge, sources = draw(_merges(have, first))
    width = merged_width([have[source] for source in sources], merge)
    twins = [
        position
        for position, node in enumerate(network.nodes)
        if node.shares is None and merged_width([have[i] for i in node.sources], node.merge) == width
    ]
    if twins and draw(st.integers(0, 3)) == 0:
        shares = draw(st.sampled_from(twins))
        block = network.nodes[shares].block
        return Node(sources, merge, block, block.outgoing(width) == width, shares)
    block = draw(_blocks(width, widths))
    residual = block.outgoing(width) == width and draw(st.integers(0, 3)) > 0
    return Node(sources, merge, block, residual)


@st.composite
def _merges(draw: DrawFn, have: list[int], first: int) -> tuple[Merge, tuple[int, ...]]:
    equals = [i for i, width in enumerate(have) if width == have[first] and i != first]
    others = [i for i in range(len(have)) if i != first and have[i] + have[first] <= 24]
    kinds: list[Merge] = ["first", "first"]
    kinds += ["sum", "product"] if equals else []
    kinds += ["concat"] if others else []
    merge = draw(st.sampled_from(kinds))
    if merge == "first":
        return merge, (first,)
    return merge, (first, draw(st.sampled_from(others if merge == "concat" else equals)))


def _blocks(width: int, widths: tuple[int, ...]) -> SearchStrategy[Block]:
    kinds: list[SearchStrategy[Block]] = [
        st.builds(
            Linear,
            st.sampled_from(widths),
            st.booleans(),
            st.booleans(),
            st.lists(st.sampled_from([3, 4]), max_size=2).map(tuple),
        ),
        st.builds(Activation, st.sampled_from(["relu", "gelu", "silu", "tanh", "sigmoid"])),
        st.builds(
            Gated,
            st.sampled_from(widths),
            st.sampled_from(["separate", "chunk", "split", "slice"]),
            st.booleans(),
        ),
        _norms(width),
        _attentions(),
        _attentions(),
        _rearranged(width),
        _cuts(width),
        _convolutions(width, widths),
        st.builds(Ladder, st.tuples(st.sampled_from([3, 4]), st.sampled_from([6, 8]))),
    ]
    return st.one_of(kinds)


def _norms(width: int) -> SearchStrategy[Norm]:
    plain = st.sampled_from(["layer", "written layer", "rms", "written rms", "batch"])
    groups = st.sampled_from(_divisors(width)[:-1])
    return st.one_of(st.builds(Norm, plain), st.builds(Norm, st.just("group"), groups))


@st.composite
def _attentions(draw: DrawFn) -> Attention:
    fusion = draw(st.sampled_from(["separate", "stacked", "per_head", "unbound", "per_group"]))
    repeat = 1 if fusion in ("per_head", "unbound") else draw(st.sampled_from([1, 2, 3]))
    width = draw(st.sampled_from([3, 4, 6]))
    equal = fusion in ("unbound", "per_group")
    turns = ["none", "halves", "pairs", "partial"] if width % 2 == 0 else ["none"]
    return Attention(
        key_heads=draw(st.sampled_from([1, 2, 3])),
        repeat=repeat,
        width=width,
        value_width=width if equal else draw(st.sampled_from([3, 4])),
        fusion=fusion,
        turn=draw(st.sampled_from(turns)),
        attend=draw(st.sampled_from(["operator", "written", "grouped"])),
        causal=draw(st.booleans()),
        normed=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def _rearranged(draw: DrawFn, width: int) -> Rearranged:
    factors: tuple[int, ...] = draw(st.sampled_from(factorisations(width)))
    order = tuple(draw(st.permutations(range(len(factors)))))
    scaled = tuple(draw(st.booleans()) for _ in factors)
    reducible = width // factors[order[-1]] > 2
    reduced = draw(st.sampled_from(["no", "no", "sum", "mean"] if reducible else ["no"]))
    return Rearranged(factors, order, scaled, reduced)


@st.composite
def _cuts(draw: DrawFn, width: int) -> Cut:
    count = draw(st.integers(2, 3))
    ends = sorted(draw(st.sets(st.integers(1, width - 1), min_size=count - 1, max_size=count - 1)))
    sizes = tuple(b - a for a, b in itertools.pairwise([0, *ends, width]))
    order = draw(st.permutations(range(count)))
    chosen = tuple(order[: draw(st.integers(1, count))])
    if sum(sizes[piece] for piece in chosen) < 3 or 1 in [sizes[piece] for piece in order[len(chosen) :]]:
        chosen = tuple(order)
    return Cut(sizes, chosen, draw(st.booleans()))


@st.composite
def _convolutions(draw: DrawFn, width: int, widths: tuple[int, ...]) -> Convolution:
    groups = draw(st.sampled_from(_divisors(width)))
    fitting = [size for size in (*widths, width, 2 * width) if size % groups == 0 and size <= 24]
    return Convolution(draw(st.sampled_from(fitting or [width])), groups, draw(st.sampled_from([1, 3])))


def factorisations(width: int) -> list[tuple[int, ...]]:
    """Return all ways to write `width` as an ordered product of two or three factors, none of them 1."""
    pairs = [(a, width // a) for a in _divisors(width)[1:-1]] or [(1, width)]
    triples = [(a, b, c) for a, rest in pairs for b, c in [(d, rest // d) for d in _divisors(rest)[1:-1]]]
    return [*pairs, *triples]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
