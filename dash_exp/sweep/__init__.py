"""From many overrides to many cells: expand, plan, freeze, run here or on SLURM, watch.

spec (sweeps/x.yaml) or multirun (-m key=a,b) -> combinations of overrides
plan       every combination composed, checked and given its id, with resources and partners
dispatch   the plan is written to its manifest, every cell is frozen, and its cells are started:
local      here: a controller -> pool -> worker -> `python -m dash_exp.cell <folder>`
slurm/     on SLURM: jobs that run such a pool
teachers   traces that cells wait for are made first, then these cells get their ids
__main__   the commands: lookup finds sweeps, status and states read their cells, preview is a dry run,
           watch and report print
"""
