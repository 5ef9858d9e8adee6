"""Serves a scorer to runs elsewhere; see kvpo_jax/rewards/server.py."""

from kvpo_jax.rewards.server import cli

if __name__ == "__main__":
    cli()
