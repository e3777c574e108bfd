"""Puzzle, FFN Fusion and Minitron: the science of puzzle_dag, free of any orchestrator."""

__version__ = "0.1.0"
