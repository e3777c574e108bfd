"""What a variant costs on a target: bytes by arithmetic, seconds by probes in the engine that will serve."""
