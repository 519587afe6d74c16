"""Evaluation: metrics of sampled answers, with confidence intervals over prompts."""
