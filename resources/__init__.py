"""What assets use and puzzle_dag must not know: where things lie, what was materialised, who holds the device."""
