"""Which pieces: scores of the candidate blocks, the exact search over them, its baselines and the frontier."""
