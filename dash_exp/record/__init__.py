"""A cell's record: its identity and lock, the files in its folder, checkpoints, and sweep manifests."""
