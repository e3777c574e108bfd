"""What the search leads to: children put together, healed, graded and compared with their parent."""
