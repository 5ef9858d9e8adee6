"""Takes a LoRA back to PyTorch; see kvpo_jax/convert/export_lora.py."""

from kvpo_jax.convert.export_lora import cli

if __name__ == "__main__":
    cli()
