"""Many vLLM servers as one sampler: their processes, their HTTP, and which requests go where."""
