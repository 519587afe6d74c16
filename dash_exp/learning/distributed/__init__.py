"""A learner over several ranks: how they start, communicate, and hold or shard the weights."""
