"""vLLM: in this process, and in the process of a server."""
