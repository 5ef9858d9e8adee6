"""Held-out evaluation: the same prompts and the same noise for the reference, the online and the EMA policy.

python -m kvpo_jax.evaluate --workdir=runs/tiny-...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct
from jax.sharding import Mesh

from kvpo_jax import report, rollout, sharding
from kvpo_jax.backbone import Backbone
from kvpo_jax.decoder import Decoder
from kvpo_jax.rewards import composite
from kvpo_jax.types import Array, PyTree


@struct.dataclass
class Heldout:
    """Videos of one policy on the held-out prompts.

    Attributes:
      pixels: [m, frames, h, w, 3], m <= report.PICTURED: of the first prompts, as many as follow one another on this
        process's devices.
      reward: float[n], the composite reward.
      components: name -> float[n], of what is optimised and of what is only watched (config.eval.scorer).
    """

    pixels: np.ndarray
    reward: np.ndarray
    components: dict[str, np.ndarray]


@struct.dataclass
class PromptBatch:
    """P prompt sequences, ready for the rollout.

    Attributes:
      embeddings: float[P, M, K, text_dim].
      changed: bool[P, M], where a segment's sentence differs from the one before it.
      sentences: P sequences of M sentences (static).
    """

    embeddings: Array
    changed: np.ndarray
    sentences: tuple[tuple[str, ...], ...] = struct.field(pytree_node=False)


def prompt_batch(backbone: Backbone, mesh: Mesh, split: str, indices: Sequence[int]) -> PromptBatch:
    """The prompt sequences of a split by their index."""
    sentences = tuple(tuple(backbone.prompts(split, index)) for index in indices)
    own = sharding.own_prompts(mesh, len(sentences))
    flat = backbone.embed([s for i in own for s in sentences[i]])
    embeddings = flat.reshape(len(own), -1, *flat.shape[1:])
    changed = np.array([[m == 0 or s[m] != s[m - 1] for m in range(len(s))] for s in sentences])
    return PromptBatch(sharding.from_own_prompts(embeddings, mesh, len(sentences)), changed, sentences)


def release(config: ml_collections.ConfigDict, backbone: Backbone) -> None:
    """Lets go of the weights of the rewards until they are needed again, if config.reward.resident is False."""
    if not config.reward.resident:
        backbone.rewards.release()
        backbone.watch.release()


def batch_size(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """Held-out videos that are generated at once: config.eval.batch, or as many as there are prompts in training.

    Raises:
      ValueError: the held-out prompts cannot be divided into such batches, or a batch over the mesh.
    """
    prompts, shards = config.eval.prompts, mesh.shape["data"]
    most = config.eval.batch or rollout.prompts_at_once(config)
    fitting = [n for n in range(1, most + 1) if prompts % n == 0 and n % shards == 0]
    if not fitting or config.eval.batch not in (0, fitting[-1]):
        batch = f"eval.batch={config.eval.batch}, and that of " if config.eval.batch else ""
        raise ValueError(f"eval.prompts={prompts} must be a multiple of {batch}the mesh's {shards} shards of prompts")
    return fitting[-1]


def evaluate(
    config: ml_collections.ConfigDict,
    backbone: Backbone,
    mesh: Mesh,
    stages: rollout.Stages,
    decoder: Decoder,
    variables: PyTree,
) -> Heldout:
    """Generates and scores every held-out prompt; the noise depends on the prompt's index alone."""
    count = batch_size(config, mesh)

    def score(pixels: Array, sentences: Sequence[Sequence[str]]) -> dict[str, Array]:
        of_clips = lambda scorer: composite.segment_rewards(
            scorer, pixels, sentences, config.video.switch_frames, config.reward.clip_frames, backbone.to_pixel
        )
        rewards, watched = of_clips(backbone.rewards), of_clips(backbone.watch)
        composite.check(rewards, watched, config.reward.weights)
        return rewards | watched

    def generate(batch: PromptBatch, first: int) -> Array:
        """Pixels [P, 1, frames, h, w, 3] of this process's prompts. No name keeps the cache."""
        text = stages.encode_text(variables, batch.embeddings)
        noise = rollout.NoiseKey(rollout.stream(0, "heldout", 0), jnp.arange(first, first + count))
        latents = rollout.generate(stages, config, variables, text, batch.changed, noise, config.video.blocks)[0]
        return sharding.own_part(decoder.videos(jnp.concatenate(latents, axis=1)[:, None]))

    own = sharding.own_prompts(mesh, count)
    pixels, components = [], []
    for first in range(0, config.eval.prompts, count):
        batch = prompt_batch(backbone, mesh, "heldout", range(first, first + count))
        videos = generate(batch, first)
        scores = sharding.gather(partial(score, videos, [batch.sentences[i] for i in own]), mesh)
        if first + own[0] == len(pixels):
            pixels.extend(np.asarray(videos[: report.PICTURED - len(pixels), 0]))
        components.append({name: np.asarray(value)[:, 0] for name, value in scores.items()})
    release(config, backbone)
    merged = {name: np.concatenate([c[name] for c in components]) for name in components[0]}
    reward = np.asarray(composite.composite(merged, config.reward.weights))
    return Heldout(np.array(pixels), reward, merged)
