"""Prepares prompt files; see kvpo_jax/convert/prepare_prompts.py."""

from kvpo_jax.convert.prepare_prompts import cli

if __name__ == "__main__":
    cli()
