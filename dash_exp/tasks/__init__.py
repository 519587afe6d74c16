"""Tasks: where questions come from, how they become prompts, and in which order they are asked."""
