"""KVPO in JAX: ODE-native GRPO for streaming autoregressive video generators (arXiv 2605.14278)."""

__version__ = "0.1.0"
