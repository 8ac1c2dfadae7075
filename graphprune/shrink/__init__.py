"""A plan applied: a smaller graph, a smaller module, and its folder on disk."""
