"""Which units go: progressive training and the plan."""
