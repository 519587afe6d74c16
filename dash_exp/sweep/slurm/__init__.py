"""Sweeps on a SLURM cluster: job arrays, their submission, what a job runs, what the queue reports."""
