"""The proof, on this very model, that its node groups are right."""

from graphprune.packages import make_callable

make_callable(__name__, "graphprune.certify.certificate", "certify")
