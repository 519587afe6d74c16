"""From many overrides to many cells: expand, plan, freeze, run here or on SLURM, watch. Torch-free.

    sweeps/x.yaml ─ spec ─┐
    -m key=a,b ─ multirun ┴► expand ─ combinations ─► plan ─ Plan ─► manifest ─ frozen cells ─► dispatch
                                                       │                                           │
          composer, drafts, pairing, resources, settings, hardware, told                           │
                                                                                                   ▼
    here:   local (controller) ─► pool ─► worker ─► python -m dash_exp.cell <folder>  ◄─ slurm_job ◄─ slurm
                 teachers, shares, failures, endings               slurm_arrays, slurm_faults, slurm_teachers
                                                     │ records, journal
                                                     ▼
    sweep:  commands ─► planning, preview, estimate │ watching ─ status ─ states ─ verdict │ cancel, lookup
            report, summary: what is printed          tails, processes, queue: what is looked at

`jobs` has the types that travel down; `journal` is what launchers write about a cell.
"""
