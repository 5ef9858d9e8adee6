"""Encodes prompts with UMT5; see kvpo_jax/convert/encode_prompts.py."""

from kvpo_jax.convert.encode_prompts import cli

if __name__ == "__main__":
    cli()
