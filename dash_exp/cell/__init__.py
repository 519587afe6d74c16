"""One run of one cell: its lock, its attempt, and a status that is right however it ends."""
