"""What differs between backbones, in one struct: weights, prompts, text encoder, decoder and reward.

Everything else of an iteration is the same for the toy, LongLive and MemFlow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from kvpo_jax import checkpoint
from kvpo_jax.data import toy_world
from kvpo_jax.models.wan import WanConfig, init_variables, wan_config
from kvpo_jax.rewards import toy
from kvpo_jax.types import Array, PyTree

TOY_WEIGHTS = Path(__file__).parent / "assets" / "toy_generator.safetensors"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A generator with its world.

    Attributes:
      load: (sharding or None) -> the collection `params`.
      prompts: (split, index) -> a prompt sequence of M sentences; split is "train" or "heldout".
      embed: sentences -> token embeddings float[n, K, text_dim], zero past the prompt's end.
      decode: latents float[..., frames, Y, X, C] -> pixels float[..., frames', h, w, 3] in [0, 1]; jit-able.
      scorer: (pixels float[n, frames', h, w, 3], sentences) -> component -> float[n].
      to_pixel: first pixel frame of a latent frame.
    """

    load: Callable[[jax.sharding.Sharding | None], PyTree]
    prompts: Callable[[str, int], list[str]]
    embed: Callable[[Sequence[str]], np.ndarray]
    decode: Callable[[Array], Array]
    scorer: Callable[[Array, Sequence[str]], dict[str, Array]]
    to_pixel: Callable[[int], int]


def load_params(path: Path | str, cfg: WanConfig, sharding: jax.sharding.Sharding | None = None) -> PyTree:
    """The collection `params` of a converted checkpoint; strict (see `checkpoint.load_weights`)."""
    like = jax.eval_shape(lambda key: init_variables(cfg, key)["params"], jax.random.key(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    return checkpoint.load_weights(path, like)


def toy_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """The toy world with the generator that ships with the package, or the one that config.weights names."""
    path, cfg = config.weights or TOY_WEIGHTS, wan_config(config)
    segments = len(config.video.switch_frames) + 1

    def prompts(split: str, index: int) -> list[str]:
        return toy_world.sample_prompts((config.seed if split == "train" else 0, index), split, segments)

    return Backbone(
        load=lambda sharding: load_params(path, cfg, sharding),
        prompts=prompts,
        embed=toy_world.embed,
        decode=toy_world.decode,
        scorer=toy.score,
        to_pixel=lambda frame: frame,
    )


BACKBONES = {"toy": toy_backbone}


def load(config: ml_collections.ConfigDict) -> Backbone:
    """The backbone that config.backbone names."""
    if config.backbone not in BACKBONES:
        raise ValueError(
            f"backbone={config.backbone!r} cannot be run: this version trains {', '.join(BACKBONES)}; the text "
            "encoder, the video decoder and the reward models of the others are not in it yet"
        )
    return BACKBONES[config.backbone](config)
