"""The layout algebra against plain index arithmetic."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphprune.coupling.layout import Layout, LayoutSolver, find
from graphprune.coupling.selection import select, unit_of_index

SIZES = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def layouts(draw, solver: LayoutSolver, depth: int = 2) -> Layout:
    form = draw(st.sampled_from(["atom", "product", "concat"])) if depth else "atom"
    if form == "atom":
        return solver.atom(draw(SIZES))
    parts = [draw(layouts(solver, depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    return solver.product(parts) if form == "product" else solver.concat(parts)


@given(st.data())
def test_select_is_index_arithmetic(data):
    """What a choice of units keeps, computed with nested loops instead."""
    solver = LayoutSolver()
    layout = data.draw(layouts(solver))
    atoms = {atom.identity: atom for atom in solver.atoms(layout)}
    selection = {
        identity: np.array(
            data.draw(st.permutations(range(atom.size)))[: data.draw(st.integers(1, atom.size))]
        )
        for identity, atom in atoms.items()
    }

    def by_loops(node: Layout) -> list[int]:
        node = find(node)
        if node.form == "atom":
            return [int(i) for i in selection.get(node.identity, range(node.size))]
        if node.form == "concat":
            offsets = np.cumsum([0, *(part.size for part in node.parts)])
            return [int(offset) + i for part, offset in zip(node.parts, offsets) for i in by_loops(part)]
        indices = [0]
        for part in node.parts:
            indices = [i * part.size + j for i in indices for j in by_loops(part)]
        return indices

    assert select(layout, selection).tolist() == by_loops(layout)


@given(st.data())
def test_unify_leaves_two_layouts_that_select_alike(data):
    """After unification every choice of units keeps the same indices of both, or the layouts are pinned."""
    solver = LayoutSolver()
    first, second = data.draw(layouts(solver)), data.draw(layouts(solver))
    if first.size != second.size:
        second = solver.product([solver.atom(first.size)])
    solver.unify(first, second, "test")
    solver.settle()
    atoms = {atom.identity: atom for node in (first, second) for atom in solver.atoms(node)}
    free = {identity: atom for identity, atom in atoms.items() if not atom.pins}
    selection = {
        identity: np.array(data.draw(st.permutations(range(atom.size)))) for identity, atom in free.items()
    }
    assert select(first, selection).tolist() == select(second, selection).tolist()


@given(st.permutations([2, 2, 3, 4]), st.permutations([2, 2, 3, 4]))
def test_factorisations_find_their_common_refinement_or_are_pinned(first, second):
    solver = LayoutSolver()
    a = solver.product([solver.atom(size) for size in first])
    b = solver.product([solver.atom(size) for size in second])
    solver.unify(a, b, "test")
    solver.settle()
    assert find(a) is find(b)
    assert math.prod(atom.size for atom in solver.atoms(a)) == 48


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 3))
def test_segments_are_cut_where_either_side_ends(sizes, shift):
    """The boundaries of a refined concatenation are those of both sides."""
    total = sum(sizes)
    other = [total - shift, shift] if 0 < shift < total else [total]
    solver = LayoutSolver()
    a = solver.concat([solver.atom(size) for size in sizes])
    b = solver.concat([solver.atom(size) for size in other])
    solver.unify(a, b, "test")
    found = np.cumsum([segment.size for segment in solver.segments(a)]).tolist()
    assert set(found) == set(np.cumsum(sizes).tolist()) | set(np.cumsum(other).tolist())


def test_fused_heads_distribute_over_a_concatenation():
    """Fused query, key and value seen as (heads + kv + kv) × width."""
    solver = LayoutSolver()
    width = solver.atom(4)
    fused = solver.product([solver.atom(10), width])
    query, key, value = solver.atom(24), solver.atom(8), solver.atom(8)
    solver.unify(solver.concat([query, key, value]), fused, "split")
    assert [segment.size for segment in solver.segments(fused)] == [24, 8, 8]
    assert [factor.size for factor in solver.factors(query)] == [6, 4]
    assert find(solver.factors(key)[-1]) is find(width)


def test_rotary_halves_share_their_pairs():
    """A width that is concatenated from one half twice: a unit owns one index of each half."""
    solver = LayoutSolver()
    pairs = solver.atom(3)
    width = solver.concat([pairs, pairs])
    head = solver.product([solver.atom(2), width])
    owner = unit_of_index(head, find(pairs))
    assert owner.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_layouts_without_a_common_refinement_are_pinned_with_the_operators_name():
    solver = LayoutSolver()
    a = solver.product([solver.atom(2), solver.atom(3)])
    b = solver.product([solver.atom(3), solver.atom(2)])
    solver.unify(a, b, "view_7")
    solver.settle()
    assert all(any("view_7" in reason for reason in atom.pins) for atom in solver.atoms(a))


def test_every_coupling_names_its_operator():
    solver = LayoutSolver()
    a, b, c = solver.atom(4), solver.atom(4), solver.atom(4)
    solver.unify(a, b, "linear_1")
    solver.unify(b, c, "add_2")
    assert [coupling.operator for coupling in solver.couplings] == ["linear_1", "add_2"]
