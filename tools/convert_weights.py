"""Converts PyTorch checkpoints; see kvpo_jax/convert/convert_weights.py."""

from kvpo_jax.convert.convert_weights import cli

if __name__ == "__main__":
    cli()
