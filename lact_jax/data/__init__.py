"""Datasets, one a file; the table is in `lact_jax.data.datasets`."""
