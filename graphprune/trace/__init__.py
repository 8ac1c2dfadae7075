"""A model as an operator graph; one file for each front end."""
