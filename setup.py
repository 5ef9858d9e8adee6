"""Installs kvpo_jax; on CPU by default, see the extras."""

import pathlib
import re

import setuptools

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "kvpo_jax" / "__init__.py").read_text())[1]

# Prompt datasets, stored embeddings and the tokenizer; TensorFlow is not among what these need here.
data = ["array_record>=0.8", "tensorflow-datasets>=4.9.7", "tqdm>=4.66", "transformers>=5.0"]
# Reading checkpoints of the PyTorch releases; training never needs these.
convert = ["torch>=2.4"]

setuptools.setup(
    name="kvpo_jax",
    version=version,
    description="KVPO in JAX: online GRPO for streaming autoregressive video generators",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*setuptools.find_packages(include=["kvpo_jax", "kvpo_jax.*"]), "kvpo_jax.configs"],
    # In a checkout configs/ stands next to the package, where one looks for it; installed, inside.
    package_dir={"kvpo_jax.configs": "configs"},
    package_data={"kvpo_jax": ["assets/*"]},
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "einops>=0.8",
        "flax>=0.12",
        "ftfy>=6.2",
        "imageio>=2.35",
        "imageio-ffmpeg>=0.5",
        "jax>=0.10.2",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.28",
        "pillow>=10.1",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2.2",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.2"],
        "data": data,
        "convert": convert,
        "test": [
            *data,
            *convert,
            "diffusers>=0.36",
            "peft>=0.18",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            "scikit-image>=0.24",
            "setuptools>=77",
        ],
    },
)
