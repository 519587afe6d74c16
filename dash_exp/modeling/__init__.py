"""Models: where weights come from, and attention over packed groups."""
