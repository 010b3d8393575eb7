"""What a run will need before any card is booked: `python -m lact_jax.plan` (see plan.py)."""
