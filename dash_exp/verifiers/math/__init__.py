"""Judges answers to maths problems: extract, normalise, parse, compare."""
