"""Statistics shared by training, sweeps and analysis."""
