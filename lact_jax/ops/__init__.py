"""Pure functions on arrays: attention, rotary positions, fast weights."""
