"""Scores of units."""
