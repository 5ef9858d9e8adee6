"""Plans the memory of a run: see kvpo_jax/plan_memory.py, or --help."""

from kvpo_jax.plan_memory import cli

if __name__ == "__main__":
    cli()
