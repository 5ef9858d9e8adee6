"""Reads a training YAML of KVPO's release; see kvpo_jax/convert/import_config.py."""

from kvpo_jax.convert.import_config import cli

if __name__ == "__main__":
    cli()
