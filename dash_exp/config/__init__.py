"""Settings: their schema, and how yaml files and a command line become a checked config."""
