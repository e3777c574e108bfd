"""Serving as users see it: `vllm serve` under load over HTTP, and a child as the draft model of its own parent."""
