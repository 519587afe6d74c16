"""Evaluate a checkpoint of a cell, or a base model, from the command line."""
