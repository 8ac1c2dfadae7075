"""From an operator graph to node groups: the layout algebra, the rules, the solver. Imports no torch."""
