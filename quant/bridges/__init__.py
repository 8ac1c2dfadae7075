"""Ways to and from other libraries. Each bridge imports its library inside its functions, when one is called."""
