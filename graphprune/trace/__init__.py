"""A model as an operator graph; one file for each front end."""

from graphprune.packages import make_callable

make_callable(__name__, "graphprune.trace.model", "trace")
