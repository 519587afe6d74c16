"""From what a user typed to many cells that run, here or on SLURM.

request     `-m key=a,b`, a file of sweeps/ (spec) or a launched sweep, as a launch request
plan        every combination composed, checked and given its id; partners found, traces noted
resources   what a cell asks for, what this machine is, which settings belong to a launch
dispatch    the plan is written to a manifest, its cells are frozen and started, or cancelled:
            local (a controller, its pool and workers) or slurm/ (jobs that run such a pool);
            traces are made first, then the cells that wait for them get their ids
__main__    the commands: states and status look at cells, preview at a plan, report and watch print
"""
