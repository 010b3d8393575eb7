"""LaCT autoregressive video diffusion in JAX: Wan2.1 made chunk-causal, with fast-weight memory."""

__version__ = "0.1.0"
