"""The proof, on this very model, that its node groups are right."""
