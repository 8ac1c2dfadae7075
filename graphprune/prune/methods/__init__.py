"""Pruning methods, one a file, behind one interface: `registry.Task` in, `registry.Pruned` out."""
