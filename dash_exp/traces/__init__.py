"""Traces: a teacher's correct answers to a dataset, sampled once and kept in a file to train on."""
