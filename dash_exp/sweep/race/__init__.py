"""`python -m dash_exp.sweep race`: add seeds until comparisons are decided, or advance a grid by rungs."""
