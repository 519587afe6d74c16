"""From many overrides to many cells: expand, plan, freeze, run here or on SLURM, watch. Torch-free."""
