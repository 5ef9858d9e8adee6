"""What differs between backbones, in one struct: weights, prompts, text encoder, decoder and reward.

Everything else of an iteration is the same for the toy, LongLive and MemFlow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kvpo_jax import checkpoint
from kvpo_jax.data import prompts, text, toy_world
from kvpo_jax.models import umt5, wan_vae
from kvpo_jax.models.wan import WanConfig, init_variables, wan_config
from kvpo_jax.rewards import composite, preprocess, registry
from kvpo_jax.types import Array, PyTree

if TYPE_CHECKING:
    from kvpo_jax.data.embeddings import Embeddings

TOY_WEIGHTS = Path(__file__).parent / "assets" / "toy_generator.safetensors"
TEXT_BATCH = 8  # prompts that the text encoder takes at once

Sharding = jax.sharding.Sharding | None


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A generator with its world.

    Attributes:
      load: (sharding) -> the collection `params`.
      load_lora: (sharding) -> the collection `lora` that training starts from, or None for a fresh one.
      prompts: (split, index) -> a prompt sequence of M sentences; split is "train" or "heldout".
      embed: sentences -> token embeddings float[n, K, text_dim], zero past the prompt's end.
      load_decoder: (sharding) -> the decoder's weights.
      decode: (decoder weights, latents float[n, F, Y, X, C], state) -> (pixels [n, frames', h, w, 3], state): the next
        frames of n videos, jit-able; float in [0, 1] or uint8. The state of the first ones is None, the leaves of the
        others have n first.
      rewards: (pixels float[n, frames', h, w, 3], sentences) -> component -> float[n]; what is optimised.
      watch: as `rewards`, of components that are evaluated on held-out prompts and never optimised.
      to_pixel: first pixel frame of a latent frame.
      fps: pixel frames per second.
    """

    load: Callable[[Sharding], PyTree]
    load_lora: Callable[[Sharding], PyTree | None]
    prompts: Callable[[str, int], list[str]]
    embed: Callable[[Sequence[str]], np.ndarray]
    load_decoder: Callable[[Sharding], PyTree]
    decode: Callable[[PyTree, Array, Any], tuple[Array, Any]]
    rewards: registry.Rewards
    watch: registry.Rewards
    to_pixel: Callable[[int], int]
    fps: int


# ---------------------------------------------------------------- weight files


def load_params(path: Path | str, cfg: WanConfig, sharding: Sharding = None) -> PyTree:
    """The collection `params` of a converted checkpoint; strict (see `checkpoint.load_weights`)."""
    like = jax.eval_shape(lambda key: init_variables(cfg, key)["params"], jax.random.key(0))
    return checkpoint.load_weights(path, _placed(like, sharding))


def load_lora(path: Path | str, cfg: WanConfig, sharding: Sharding = None) -> PyTree:
    """The collection `lora` of a converted adapter; ValueError where its rank or alpha is not the config's."""
    made = checkpoint.metadata_config(path, "wan_lora")
    if (made["rank"], made["alpha"]) != (cfg.lora_rank, cfg.lora_alpha):
        raise ValueError(
            f"{path} has rank {made['rank']} and alpha {made['alpha']}, the config has lora.rank={cfg.lora_rank} and "
            f"lora.alpha={cfg.lora_alpha}; add --config.lora.rank={made['rank']} --config.lora.alpha={made['alpha']}"
        )
    like = jax.eval_shape(lambda key: init_variables(cfg, key)["lora"], jax.random.key(0))
    return checkpoint.load_weights(path, _placed(like, sharding))


def _placed(like: PyTree, sharding: Sharding) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


# ---------------------------------------------------------------- the toy


def toy_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """The toy world with the generator that ships with the package, or the one that config.weights names."""
    path, cfg = config.weights or TOY_WEIGHTS, wan_config(config)
    segments = len(config.video.switch_frames) + 1

    def sequence(split: str, index: int) -> list[str]:
        return toy_world.sample_prompts((config.seed if split == "train" else 0, index), split, segments)

    return Backbone(
        load=partial(load_params, path, cfg),
        load_lora=lambda sharding: load_lora(config.paths.lora, cfg, sharding) if config.paths.lora else None,
        prompts=sequence,
        embed=toy_world.embed,
        load_decoder=lambda sharding: {},
        decode=lambda decoder, latents, state: (toy_world.decode(latents), ()),
        rewards=registry.Rewards(config.reward.scorer, config.paths),
        watch=registry.Rewards(config.eval.scorer, config.paths),
        to_pixel=lambda frame: frame,
        fps=8,
    )


# ---------------------------------------------------------------- LongLive and MemFlow


def stored_embeddings(config: ml_collections.ConfigDict) -> Embeddings:
    """What config.paths.embeddings has; ValueError where its sizes are not the model's."""
    try:
        from kvpo_jax.data import embeddings
    except ImportError as error:
        raise ImportError("prompt embeddings are read with: pip install 'kvpo_jax[data]'") from error
    made = embeddings.open_embeddings(config.paths.embeddings)
    if (made.text_len, made.dim) != (config.model.text_len, config.model.text_dim):
        raise ValueError(
            f"{config.paths.embeddings} has {made.text_len} tokens of width {made.dim}, the config has "
            f"model.text_len={config.model.text_len} and model.text_dim={config.model.text_dim}"
        )
    return made


def text_encoder(config: ml_collections.ConfigDict) -> Callable[[Sequence[str]], np.ndarray]:
    """sentences -> token embeddings, made with UMT5 on the fly."""
    shape = (config.model.text_len, config.model.text_dim)
    cfg = umt5.UMT5Config(**checkpoint.metadata_config(config.paths.umt5, "umt5"))
    tokenize = text.tokenizer(config.paths.tokenizer, config.model.text_len)
    load = cache(lambda: checkpoint.load_weights(config.paths.umt5, umt5.abstract_params(cfg)))
    encode = jax.jit(partial(umt5.embed, cfg))

    def embed(sentences: Sequence[str]) -> np.ndarray:
        ids, mask = tokenize(sentences)
        out = np.zeros((len(sentences), *shape), np.float32)
        valid = umt5.embed_valid(partial(encode, load()), ids, mask, TEXT_BATCH)
        for row, embedding in zip(out, valid, strict=True):
            row[: len(embedding)] = embedding
        return out

    return embed


def decode(vae: wan_vae.VAEConfig, decoder: PyTree, latents: Array, state: Any) -> tuple[Array, Any]:
    """Latents float[n, F, Y, X, C] to pixels uint8[n, frames, h, w, 3]; `state` is what came before (None: nothing).

    One video at a time: the decoder's activations are a hundred times its input. And in place: so is its state.
    """

    def of_video(x: Array, before: Any) -> tuple[Array, Any]:
        pixels, after = wan_vae.decode(vae, decoder, x[None], before)
        return preprocess.to_uint8((pixels[0] + 1) / 2), after

    def next_frames(state: Any, video: tuple[Array, Array]) -> tuple[Any, Array]:
        index, x = video
        pixels, after = of_video(x, jax.tree.map(lambda s: jax.lax.dynamic_slice_in_dim(s, index, 1), state))
        write = lambda s, new: jax.lax.dynamic_update_slice_in_dim(s, new, index, 0)
        return jax.tree.map(write, state, after), pixels

    if state is None:
        pixels, state = jax.lax.map(lambda x: of_video(x, None), latents)
        return pixels, jax.tree.map(lambda s: s[:, 0], state)
    state, pixels = jax.lax.scan(next_frames, state, (jnp.arange(len(latents)), latents))
    return pixels, state


def wan_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """A causal Wan2.1 generator with its VAE and UMT5; files as `config.check_files` asks for them."""
    cfg = wan_config(config)
    segments = len(config.video.switch_frames) + 1
    if config.eval.prompts > config.train.held_out:
        raise ValueError(
            f"config.eval.prompts={config.eval.prompts}, but only config.train.held_out={config.train.held_out} "
            "sequences of the prompt file are never trained on; ask for fewer, or hold out more in a new run"
        )
    vae = wan_vae.config_from_dict(checkpoint.metadata_config(config.paths.vae, "wan_vae"))
    stored = stored_embeddings(config) if config.paths.embeddings else None

    @cache
    def splits() -> dict[str, list[prompts.Sequence]]:
        sequences = prompts.load(Path(config.paths.prompts))
        if stored is not None:
            stored.check([sentence for sequence in sequences for sentence in sequence.sentences])
        try:
            train, heldout = prompts.split(sequences, config.train.held_out, seed=0)
        except ValueError as error:
            raise ValueError(f"{config.paths.prompts}: {error}; lower config.train.held_out") from error
        return {"train": train, "heldout": heldout}

    def sequence(split: str, index: int) -> list[str]:
        if split == "heldout":
            return list(prompts.segments_to(splits()[split][index], segments).sentences)
        return list(prompts.segments_to(prompts.at(splits()[split], index, config.seed), segments).sentences)

    like = wan_vae.abstract_params(vae)

    return Backbone(
        load=partial(load_params, config.weights, cfg),
        load_lora=lambda sharding: load_lora(config.paths.lora, cfg, sharding) if config.paths.lora else None,
        prompts=sequence,
        embed=text_encoder(config) if stored is None else stored.lookup,
        load_decoder=lambda sharding: checkpoint.load_weights(config.paths.vae, _placed(like, sharding)),
        decode=partial(decode, vae),
        rewards=registry.Rewards(config.reward.scorer, config.paths),
        watch=registry.Rewards(config.eval.scorer, config.paths),
        to_pixel=composite.latent_to_pixel,
        fps=16,
    )


BACKBONES = {"toy": toy_backbone, "longlive": wan_backbone, "memflow": wan_backbone}


def load(config: ml_collections.ConfigDict) -> Backbone:
    """The backbone that config.backbone names; a reward that cannot be weighed is an error before it scores."""
    backbone = BACKBONES[config.backbone](config)
    components = (registry.components_of(names) for names in (config.reward.scorer, config.eval.scorer))
    composite.check(*components, config.reward.weights)
    return backbone
