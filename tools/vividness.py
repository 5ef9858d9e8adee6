"""How much of the drifting shape's reward more colour alone would bring, without training.

The held-out videos of the reference policy are scored as they are, and once more with the chroma of
every frame scaled to the energy of the clean object that it resembles most. No policy could do
better by colour alone: what a run gains beyond that is shape, motion and alignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import ml_collections
import numpy as np

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import rollout as rollout_lib
from kvpo_jax import run as run_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.data import toy_world
from kvpo_jax.rewards import composite, toy
from kvpo_jax.run import Run
from kvpo_jax.types import Array, Pixels


def vivid(pixels: Array) -> Array:
    """Frames float[..., 8, 8, 3] in [0, 1] with the colour that their objects ought to have."""
    chroma = pixels - toy_world.BACKGROUND
    clean = toy.templates(toy.centroid(pixels))
    energy = jnp.sum(chroma**2, axis=(-3, -2, -1))[..., None, None]
    clean_energy = jnp.sum(clean**2, axis=(-3, -2, -1))
    overlap = jnp.einsum("...yxc,...ksyxc->...ks", chroma, clean)
    likeness = (overlap / jnp.sqrt(energy * clean_energy + 1e-12)).reshape(*energy.shape[:-2], -1)
    scale = jnp.sqrt(clean_energy / (energy + 1e-6)).reshape(likeness.shape)
    chosen = jnp.take_along_axis(scale, likeness.argmax(axis=-1)[..., None], axis=-1)
    return jnp.clip(toy_world.BACKGROUND + chosen[..., None, None] * chroma, 0.0, 1.0)


def scores(run: Run, sentences: Sequence[Sequence[str]], pixels: Array) -> dict[str, float]:
    """The mean reward and its components of videos float[n, frames, 8, 8, 3]."""
    clips = backbone_lib.scored_clips(run.config, run.backbone.to_pixel)
    whole = Pixels(pixels[:, None], None, ((0, pixels.shape[1]),), 0)
    parts = composite.segment_rewards(run.backbone.rewards, whole, sentences, clips)
    reward = composite.composite(parts, run.config.reward.weights)
    return {name: float(np.mean(x)) for name, x in {"reward": reward, **parts}.items()}


def measure(config: ml_collections.ConfigDict) -> Mapping[str, dict[str, float]]:
    """The scores of the reference's held-out videos, "before", and with their colours, "vivid"."""
    run = run_lib.load(config)
    numbers = np.arange(config.eval.prompts, dtype=np.int32)
    batch = backbone_lib.prompt_batch(run.backbone, run.mesh, "heldout", 0, numbers)
    noise = keys.NoiseKey(keys.draw_key(0, "heldout", 0), numbers)
    variables = run.variables(run.initial_lora())
    blocks = rollout_lib.generate(run, variables, batch, noise, config.video.blocks)
    pixels = toy_world.decode(jnp.concatenate([*blocks], axis=1))
    return {
        "before": scores(run, batch.sentences, pixels),
        "vivid": scores(run, batch.sentences, vivid(pixels)),
    }
