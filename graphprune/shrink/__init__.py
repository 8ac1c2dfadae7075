"""A plan applied: a smaller graph, a smaller module, and its folder on disk."""

from graphprune.packages import make_callable

make_callable(__name__, "graphprune.shrink.model", "shrink")
