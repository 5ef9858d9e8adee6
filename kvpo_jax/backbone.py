"""A generator's world in one struct: weights, prompts, text encoder, decoder and rewards.

Everything else of an iteration is the same for the toy and for generators of Wan2.1's design.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from kvpo_jax import programs
from kvpo_jax.data import prompts, return_world, text, toy_world
from kvpo_jax.errors import MissingPackageError, Registry, UsageError, nearest
from kvpo_jax.models import umt5, wan_vae
from kvpo_jax.models.wan import WanConfig, abstract_variables
from kvpo_jax.rewards import composite, preprocess, scorers
from kvpo_jax.runtime import checkpoint, pictures, sharding
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import recorded_blocks, segment_of, wan_config
from kvpo_jax.types import Array, Pixels, PromptBatch, PyTree, Scores, SplitRows, Windows

if TYPE_CHECKING:
    from kvpo_jax.data.embeddings import Embeddings

ASSETS = Path(__file__).parent / "assets"
TEXT_BATCH = 8  # prompts that the text encoder takes at once
SHORTEST = 3  # pixel frames of a block that is scored alone

# Where arrays are put: all alike, or each as a function of its shape says; None: not on a mesh.
Placement = jax.sharding.Sharding | Callable[[Any], jax.sharding.Sharding] | None


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A generator with its world.

    Attributes:
      load_params: (sharding) -> the collection `params`.
      load_lora: (sharding) -> the collection `lora` that training starts from, or None for a fresh
        one.
      prompts: (split, index) -> a prompt sequence of M sentences; split is "train" or "heldout".
      check_sentences: (sentences) raises a UsageError if one of them cannot be embedded; it costs
        little.
      embed: sentences -> token embeddings float[n, K, text_dim], zero past the prompt's end.
      load_decoder: (sharding) -> the decoder's weights.
      depths: (windows, latent frames) -> int32[latent frames]: how far the decoder has to go with
        each latent frame of a video if these pixel frames are read; 0 is not at all.
      decode: (decoder weights, latents float[n, F, Y, X, C], depth int32[F], state) -> (pixels [n,
        frames', h, w, 3], state): the next frames of n videos, jit-able; float in [0, 1] or uint8.
        The state of the first ones is None, the leaves of the others have n first. If there are
        `rows`, it takes besides `rows=SplitRows` inside `shard_map`, and latents, pixels and state
        [n, _, rows, ...] are those of a device.
      rewards: (pixels float[n, frames', h, w, 3], sentences) -> component -> float[n]; what is
        optimised.
      watch: as `rewards`, of components that are evaluated on held-out prompts and never optimised.
      to_pixel: first pixel frame of a latent frame.
      side: pixels along a side of a latent pixel.
      fps: pixel frames per second.
      rows: Y, if `decode` can split frames over devices; 0: it cannot.
    """

    load_params: Callable[[Placement], PyTree]
    load_lora: Callable[[Placement], PyTree | None]
    prompts: Callable[[str, int], list[str]]
    check_sentences: Callable[[Sequence[str]], None]
    embed: Callable[[Sequence[str]], np.ndarray]
    load_decoder: Callable[[Placement], PyTree]
    depths: Callable[[Windows, int], np.ndarray]
    decode: Callable[[PyTree, Array, Array, Any], tuple[Array, Any]]
    rewards: scorers.Scorers
    watch: scorers.Scorers
    to_pixel: Callable[[int], int]
    side: int
    fps: int
    rows: int = 0


# ---------------------------------------------------------------- what a run asks of it


def prompt_batch(
    backbone: Backbone, mesh: Mesh, split: str, start: int, numbers: np.ndarray
) -> PromptBatch:
    """The prompt sequences start + numbers of a split, on the mesh.

    Args:
      backbone: whose prompts.
      mesh: prompts lie over it as `sharding.PROMPTS` says.
      split: "train" or "heldout".
      start: position in the split that the iteration begins at.
      numbers: int32[P], the number of each prompt in its iteration.
    """
    return batch_of(
        backbone, mesh, [tuple(backbone.prompts(split, start + int(n))) for n in numbers], numbers
    )


def batch_of(
    backbone: Backbone, mesh: Mesh, sentences: Sequence[tuple[str, ...]], numbers: np.ndarray
) -> PromptBatch:
    """P sequences of M sentences, on the mesh; `numbers` as in `prompt_batch`."""
    own = sharding.own_prompts(mesh, len(sentences))
    flat = sharding.together(lambda: backbone.embed([s for i in own for s in sentences[i]]))
    own_embeddings = flat.reshape(len(own), -1, *flat.shape[1:])
    embeddings = sharding.from_own_prompts(own_embeddings, mesh, len(sentences))
    changed = np.array([[m == 0 or s[m] != s[m - 1] for m in range(len(s))] for s in sentences])
    return PromptBatch(embeddings, changed, numbers, tuple(sentences))


def pixel_shape(config: ml_collections.ConfigDict, backbone: Backbone) -> tuple[int, int, int]:
    """Frames, height and width of a decoded video."""
    video, side = config.video, backbone.side
    frames = backbone.to_pixel(video.blocks * video.block_frames)
    return frames, side * video.height, side * video.width


def switch_pixels(config: ml_collections.ConfigDict, backbone: Backbone) -> list[int]:
    """The pixel frames at which prompts switch."""
    return [backbone.to_pixel(frame) for frame in config.video.switch_frames]


def heldout_shown(config: ml_collections.ConfigDict, backbone: Backbone) -> np.ndarray:
    """The pixel frames of a held-out video that a picture shows."""
    switches = switch_pixels(config, backbone)
    return pictures.before_after_frames(*pixel_shape(config, backbone), switches)


def scored_clips(
    config: ml_collections.ConfigDict, to_pixel: Callable[[int], int]
) -> list[composite.Clip]:
    """The clips of a run's videos that are scored; `to_pixel` is the backbone's.

    Raises:
      UsageError: a segment of config.reward.segments is none, or has no clip.
    """
    video, reward = config.video, config.reward
    segments = len(video.switch_frames) + 1
    clipping = composite.Clipping(
        video.switch_frames, reward.clip_frames, to_pixel, reward.clip_spacing
    )
    total = to_pixel(video.blocks * video.block_frames)
    clips = composite.segment_clips(total, segments, clipping)
    wanted = reward.segments or range(segments)
    if missing := set(reward.segments) - {clip.segment for clip in clips}:
        raise UsageError(
            f"config.reward.segments={reward.segments}: {min(missing)} is no prompt segment with"
            f" frames to score; there are {segments}, numbered from 0"
        )
    return [clip for clip in clips if clip.segment in wanted]


def scored_frames(config: ml_collections.ConfigDict, to_pixel: Callable[[int], int]) -> int:
    """How many frames the clips have together; they are the first ones of `Pixels`."""
    return sum(clip.end - clip.start for clip in scored_clips(config, to_pixel))


def block_clips(
    config: ml_collections.ConfigDict, to_pixel: Callable[[int], int]
) -> list[composite.Clip]:
    """The blocks of a held-out video, where each is scored alone (eval.by_block).

    A block of fewer than SHORTEST frames is scored with its neighbours, as rewards of motion need
    so many. A function of somebody's own may need longer clips, and is not asked.
    """
    names = scorers.names_of(config.reward.scorer)
    if not (config.eval.by_block and set(names) <= scorers.SCORERS.keys()):
        return []
    count, frames = config.video.block_frames, config.video.blocks * config.video.block_frames
    total, clips = to_pixel(frames), []
    for first in range(0, frames, count):
        start, end = to_pixel(first), to_pixel(first + count)
        window = composite.clip_window((start + end) // 2, total, max(end - start, SHORTEST))
        clips.append(composite.Clip(segment_of(first, config.video.switch_frames), *window))
    return clips


def block_starts(config: ml_collections.ConfigDict, to_pixel: Callable[[int], int]) -> list[int]:
    """The pixel frames at which blocks begin after others: where a video may jump."""
    count, frames = config.video.block_frames, config.video.blocks * config.video.block_frames
    return [to_pixel(first) for first in range(count, frames, count)]


def local_window(
    config: ml_collections.ConfigDict, to_pixel: Callable[[int], int], pivot: int
) -> tuple[int, int] | None:
    """The pixel frames [start, end) of the replayed blocks, where they are scored besides."""
    if config.objective.advantage != "anchor":
        return None
    frames = config.video.block_frames
    return to_pixel(pivot * frames), to_pixel((pivot + recorded_blocks(config)) * frames)


def windows_read(
    config: ml_collections.ConfigDict,
    to_pixel: Callable[[int], int],
    pivot: int | None = None,
    whole: bool = False,
) -> Windows:
    """The windows [start, end) of pixel frames that are read of a video, in the order of `Pixels`.

    Args:
      config: of the run.
      to_pixel: the backbone's.
      pivot: of a group that is scored; None for held-out videos.
      whole: whether the whole video is read besides, to be written to a file.

    Returns:
      The clips, what is scored besides (the replayed blocks of a group, the single blocks of
      held-out videos), and the whole video.
    """
    read = [(clip.start, clip.end) for clip in scored_clips(config, to_pixel)]
    if pivot is None:
        read += [(clip.start, clip.end) for clip in block_clips(config, to_pixel)]
    elif (local := local_window(config, to_pixel, pivot)) is not None:
        read.append(local)
    if whole:
        read.append((0, to_pixel(config.video.blocks * config.video.block_frames)))
    return tuple(read)


def blocks_read(
    config: ml_collections.ConfigDict,
    to_pixel: Callable[[int], int],
    windows: Windows,
    pivot: int | None = None,
) -> int:
    """The blocks of a video up to the last that is read.

    Args:
      config: of the run.
      to_pixel: the backbone's.
      windows: the pixel frames [start, end) that are read.
      pivot: of a group, whose replay reads blocks too; None for single videos.
    """
    last, frames = max((end for _, end in windows), default=0), config.video.block_frames
    replayed = 0 if pivot is None else pivot + recorded_blocks(config)
    blocks = range(replayed, config.video.blocks + 1)
    return next(n for n in blocks if to_pixel(n * frames) >= last)


def ask_group(
    config: ml_collections.ConfigDict,
    backbone: Backbone,
    sentences: Sequence[Sequence[str]],
    pixels: Pixels,
    pivot: int,
) -> Callable[[], tuple[Scores, Scores | None]]:
    """Rewards of the whole videos and, for anchor-relative advantages, of the replayed blocks.

    What is returned waits for those of servers.

    Args:
      config: of the run.
      backbone: whose rewards.
      sentences: P sequences.
      pixels: of the branches and the anchor.
      pivot: the first perturbed block.
    """
    scorer, weights, to_pixel = backbone.rewards, config.reward.weights, backbone.to_pixel
    clips = scored_clips(config, to_pixel)
    whole = composite.ask_rollout(scorer, pixels, sentences, weights, clips)
    window = local_window(config, to_pixel, pivot)
    if window is None:
        return lambda: (whole(), None)
    segment = segment_of(pivot * config.video.block_frames, config.video.switch_frames)
    at_fork = [composite.Sentence.of(sequence, segment) for sequence in sentences]
    local = composite.ask_window(scorer, pixels, at_fork, weights, window)
    return lambda: (whole(), local())


score_group = composite.at_once(ask_group)


def release_rewards(config: ml_collections.ConfigDict, backbone: Backbone) -> None:
    """Frees the weights of the rewards until they are needed again, unless reward.resident."""
    if not config.reward.resident:
        backbone.rewards.release()
        backbone.watch.release()


# ---------------------------------------------------------------- weight files


def load_params(path: Path | str, cfg: WanConfig, sharding: Placement = None) -> PyTree:
    """The collection `params` of a converted checkpoint; strict (see `checkpoint.load_weights`).

    Raises:
      UsageError: it is of another kind, or of a model of another size.
    """
    made = checkpoint.generator_sizes(path)
    made.pop("text_len", None)  # no weight depends on it
    _check_sizes(path, made, {name: getattr(cfg, name) for name in made})
    return checkpoint.load_weights(path, _placed(abstract_variables(cfg)["params"], sharding))


def load_lora(path: Path | str, cfg: WanConfig, sharding: Placement = None) -> PyTree:
    """The collection `lora` of a converted adapter; UsageError as `check_lora`."""
    check_lora(path, cfg)
    return checkpoint.load_weights(path, _placed(abstract_variables(cfg)["lora"], sharding))


def check_lora(path: Path | str, cfg: WanConfig) -> None:
    """Compares the note in a converted adapter's file with the sizes of a generator.

    Raises:
      UsageError: its rank or alpha is not the config's, or it is for a model of another size.
      OSError: there is no such file.
    """
    made = checkpoint.adapter_sizes(path)
    if (made["rank"], made["alpha"]) != (cfg.lora_rank, cfg.lora_alpha):
        raise UsageError(
            f"{path} has rank {made['rank']} and alpha {made['alpha']}, the config has"
            f" lora.rank={cfg.lora_rank} and lora.alpha={cfg.lora_alpha}; add"
            f" --config.lora.rank={made['rank']} --config.lora.alpha={made['alpha']}"
        )
    _check_sizes(path, made, {name: getattr(cfg, name, made[name]) for name in made})


def _load_first_lora(config: ml_collections.ConfigDict, sharding: Placement) -> PyTree | None:
    """The LoRA of config.paths.lora, or None where it names none."""
    path = config.paths.lora
    return load_lora(path, wan_config(config), sharding) if path else None


def _check_sizes(path: Path | str, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """UsageError that names every size of a file's model that is not the config's."""
    if other := [name for name in made if made[name] != wanted[name]]:
        has = ", ".join(f"{name} {made[name]}" for name in other)
        config = ", ".join(f"model.{name}={wanted[name]}" for name in other)
        raise UsageError(
            f"{path} is for a model of another size: it has {has}, the config {config}; bring"
            " weights of the config's size (Wan2.1's 1.3B has dim 1536 and 30 layers, 14B dim 5120"
            " and 40)"
        )


def _placed(like: PyTree, sharding: Placement) -> PyTree:
    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = sharding(x) if callable(sharding) else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    return jax.tree.map(place, like)


# ---------------------------------------------------------------- small worlds


class World(Protocol):
    """What a module of a small world has; see `toy_world` and `return_world`."""

    SIZE: int  # pixels per side
    SIDE: int  # pixels along a side of a latent pixel
    CHANNELS: int  # of a latent
    TEXT_DIM: int
    TEXT_LEN: int

    def heldout_prompts(self, count: int, segments: int) -> list[list[str]]: ...
    def sample_prompts(
        self, seed: int | tuple[int, ...], split: str, segments: int
    ) -> list[str]: ...
    def check(self, prompts: Sequence[str]) -> None: ...
    def embed(self, prompts: Sequence[str]) -> np.ndarray: ...
    def depths(self, windows: Windows, latents: int) -> np.ndarray: ...
    def decode(self, latents: Array) -> Array: ...


class Toy(NamedTuple):
    """A small world, and the generator of it that ships with the package."""

    world: World
    weights: Path


TOYS = {
    "toy": Toy(toy_world, ASSETS / "toy_generator.safetensors"),
    "return": Toy(return_world, ASSETS / "return_generator.safetensors"),
    "return_weak": Toy(return_world, ASSETS / "return_weak_generator.safetensors"),
}


def shipped_weights(config: ml_collections.ConfigDict) -> Path | None:
    """The generator that the package ships for a backbone, or None."""
    return TOYS[config.backbone].weights if config.backbone in TOYS else None


def toy_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """A small world, with the generator that ships or the one that config.weights names.

    It is the world of TOYS that config.backbone names, or the first.
    """
    world, shipped = TOYS.get(config.backbone, TOYS["toy"])
    path, cfg = config.weights or shipped or "", wan_config(config)  # a plan reads no file
    segments = len(config.video.switch_frames) + 1
    heldout = cache(lambda: world.heldout_prompts(config.eval.prompts, segments))

    def sequence(split: str, index: int) -> list[str]:
        if split == "heldout":
            return heldout()[index]
        seed = (config.seed, index)
        if config.train.tasks:  # which that world alone has: `check_tasks`
            return return_world.sample_prompts(seed, split, segments, config.train.tasks)
        return world.sample_prompts(seed, split, segments)

    return Backbone(
        load_params=partial(load_params, path, cfg),
        load_lora=partial(_load_first_lora, config),
        prompts=sequence,
        check_sentences=world.check,
        embed=world.embed,
        load_decoder=lambda sharding: {},
        depths=world.depths,
        decode=lambda decoder, latents, depth, state: (world.decode(latents), ()),
        rewards=scorers.Scorers(config.reward.scorer, config.paths, config.reward.http, fps=8),
        watch=scorers.Scorers(config.eval.scorer, config.paths, config.reward.http, fps=8),
        to_pixel=lambda frame: frame,
        side=world.SIDE,
        fps=8,
    )


def check_size(config: ml_collections.ConfigDict) -> None:
    """UsageError unless latent frames and texts are of the size of their small world, if any.

    So is a backbone that there is not.
    """
    BACKBONES[config.backbone]  # an unknown name is an error
    if config.backbone not in TOYS:
        return
    world, fields = TOYS[config.backbone].world, config_lib.flat(config)
    side, frame, text = world.SIZE // world.SIDE, "a latent frame", "a text"
    for name, what, has in (
        ("video.height", frame, side),
        ("video.width", frame, side),
        ("model.channels", frame, world.CHANNELS),
        ("model.text_dim", text, world.TEXT_DIM),
        ("model.text_len", text, world.TEXT_LEN),
    ):
        if fields[name] != has:
            of_file = f" of {config.weights}" if config.weights else ""
            raise UsageError(
                f"config.{name}={fields[name]}{of_file if name.startswith('model') else ''}:"
                f" {what} of the {config.backbone} has {has}"
            )


def check_tasks(config: ml_collections.ConfigDict) -> None:
    """UsageError for tasks that the prompts of the backbone do not have."""
    known = getattr(TOYS[config.backbone].world, "TASKS", ()) if config.backbone in TOYS else ()
    for task in config.train.tasks:
        if task not in known:
            raise UsageError(
                f"config.train.tasks={config.train.tasks}: the prompts of the backbone"
                f" {config.backbone!r} have {', '.join(known) or 'no tasks'}, not {task!r}"
                f"{nearest(task, known)}"
            )


def sized_toy(config: ml_collections.ConfigDict) -> Backbone:
    """`toy_backbone`; UsageError as `check_size`."""
    check_size(config)
    return toy_backbone(config)


# ---------------------------------------------------------------- generators of Wan2.1's design


def stored_embeddings(config: ml_collections.ConfigDict) -> Embeddings:
    """What config.paths.embeddings has; UsageError if its sizes are not the model's."""
    try:
        from kvpo_jax.data import embeddings
    except ImportError as error:
        raise MissingPackageError(
            "prompt embeddings are read with: pip install 'kvpo_jax[data]'"
        ) from error
    made = embeddings.open_embeddings(config.paths.embeddings)
    if (made.text_len, made.dim) != (config.model.text_len, config.model.text_dim):
        raise UsageError(
            f"{config.paths.embeddings} has {made.text_len} tokens of width {made.dim}, the config"
            f" has model.text_len={config.model.text_len} and"
            f" model.text_dim={config.model.text_dim}"
        )
    return made


def text_encoder(config: ml_collections.ConfigDict) -> Callable[[Sequence[str]], np.ndarray]:
    """sentences -> token embeddings, made with UMT5 on the fly."""
    shape = (config.model.text_len, config.model.text_dim)
    cfg = checkpoint.noted_config(config.paths.umt5, "umt5", umt5.UMT5Config)
    tokenize = text.tokenizer(config.paths.tokenizer, config.model.text_len)
    load = cache(lambda: checkpoint.load_weights(config.paths.umt5, umt5.abstract_params(cfg)))
    encode = programs.text_encoder(cfg)

    def embed(sentences: Sequence[str]) -> np.ndarray:
        ids, mask = tokenize(sentences)
        out = np.zeros((len(sentences), *shape), np.float32)
        valid = umt5.embed_valid(partial(encode, load()), ids, mask, TEXT_BATCH)
        for row, embedding in zip(out, valid, strict=True):
            row[: len(embedding)] = embedding
        return out

    return embed


def vae_config(config: ml_collections.ConfigDict) -> wan_vae.VAEConfig:
    """The VAE of config.paths.vae, or Wan2.1's without a file, in config.decoder.dtype."""
    vae, path = wan_vae.VAEConfig(), config.paths.vae
    if path:
        vae = checkpoint.noted_config(path, "wan_vae", wan_vae.VAEConfig)
    return dataclasses.replace(vae, dtype=config.decoder.dtype)


def decode(
    vae: wan_vae.VAEConfig,
    decoder: PyTree,
    latents: Array,
    depth: Array,
    state: Any,
    rows: SplitRows | None = None,
) -> tuple[Array, Any]:
    """Latents float[n, F, Y, X, C] to pixels uint8[n, frames, h, w, 3].

    One video at a time, because the decoder's activations are a hundred times its input; and in
    place, because its state is as large.

    Args:
      vae: its config.
      decoder: its weights.
      latents: the next block of n videos.
      depth: int32[F], how many stages each latent frame passes.
      state: what the blocks before have left; None for the first.
      rows: see `wan_vae.decode`.
    """

    def of_video(x: Array, before: Any) -> tuple[Array, Any]:
        pixels, after = wan_vae.decode(vae, decoder, x[None], before, depth, rows)
        return preprocess.to_uint8((pixels[0] + 1) / 2), after

    def next_frames(state: Any, video: tuple[Array, Array]) -> tuple[Any, Array]:
        index, x = video
        pixels, after = of_video(
            x, jax.tree.map(lambda s: jax.lax.dynamic_slice_in_dim(s, index, 1), state)
        )

        def write(s, new):
            return jax.lax.dynamic_update_slice_in_dim(s, new, index, 0)

        return jax.tree.map(write, state, after), pixels

    if state is None:
        pixels, state = jax.lax.map(lambda x: of_video(x, None), latents)
        return pixels, jax.tree.map(lambda s: s[:, 0], state)
    state, pixels = jax.lax.scan(next_frames, state, (jnp.arange(len(latents)), latents))
    return pixels, state


def check_durations(
    config: ml_collections.ConfigDict, sequences: Sequence[prompts.PromptSequence]
) -> None:
    """UsageError unless all durations are of videos as the run makes them; it says how they can be.

    Args:
      config: of the run. Its videos have one length, and prompts may switch at
        config.video.switch_frames.
      sequences: of config.paths.prompts.
    """
    video, timed = config.video, [sequence for sequence in sequences if sequence.durations]
    frames, switches = video.blocks * video.block_frames, tuple(video.switch_frames)
    for sequence in timed:
        lasting, own = sum(sequence.durations), prompts.switch_frames(sequence)
        if lasting == frames and set(own) <= set(switches):
            continue
        lengths = {sum(other.durations) for other in timed}
        wanted = sorted({frame for other in timed for frame in prompts.switch_frames(other)})
        fitting = not any(frame % video.block_frames for frame in (*lengths, *wanted))
        advice = (
            f"add --config.video.blocks={lasting // video.block_frames}"
            f" '--config.video.switch_frames={tuple(wanted)}'"
            if fitting and len(lengths) == 1
            else f"train on a file of one length in blocks of {video.block_frames}, or leave the"
            " durations out: kvpo-prompts convert FILE --format=sequences --nodurations"
        )
        raise UsageError(
            f"{config.paths.prompts}:{sequence.line}: durations {list(sequence.durations)} are of"
            f" {lasting} latent frames that switch at {own}, and a run's videos have {frames} and"
            f" switch at frames of config.video.switch_frames={switches}; {advice}"
        )


def wan_backbone(config: ml_collections.ConfigDict) -> Backbone:
    """A causal Wan2.1 generator with its VAE and UMT5; files as `check_files` asks for them."""
    cfg = wan_config(config)
    if config.eval.prompts > config.train.held_out:
        raise UsageError(
            f"config.eval.prompts={config.eval.prompts}, but only"
            f" config.train.held_out={config.train.held_out} sequences of the prompt file are never"
            " trained on; ask for fewer, or hold out more in a new run"
        )
    vae = vae_config(config)
    stored = stored_embeddings(config) if config.paths.embeddings else None

    @cache
    def splits() -> dict[str, list[prompts.PromptSequence]]:
        loaded = prompts.load(Path(config.paths.prompts))
        check_durations(config, loaded)
        # As they are used, so that nothing held out is trained on word for word.
        sequences = [
            prompts.on_segments(prompts.cleaned(sequence), config.video.switch_frames)
            for sequence in loaded
        ]
        if stored is not None:
            stored.check([sentence for sequence in sequences for sentence in sequence.sentences])
        try:
            train, heldout = prompts.split(sequences, config.train.held_out, seed=0)
        except ValueError as error:
            raise UsageError(
                f"{config.paths.prompts}: {error}; lower config.train.held_out"
            ) from error
        return {"train": train, "heldout": heldout}

    def sequence(split: str, index: int) -> list[str]:
        sequences = splits()[split]
        if split == "heldout":
            return list(sequences[index].sentences)
        return list(prompts.at(sequences, index, config.seed).sentences)

    like = wan_vae.abstract_decoder_params(vae)

    return Backbone(
        load_params=partial(load_params, config.weights, cfg),
        load_lora=partial(_load_first_lora, config),
        prompts=sequence,
        check_sentences=(lambda sentences: None) if stored is None else stored.check,
        embed=text_encoder(config) if stored is None else stored.lookup,
        load_decoder=lambda sharding: checkpoint.load_weights(
            config.paths.vae, _placed(like, sharding), wan_vae.ENCODER
        ),
        depths=partial(wan_vae.depths, vae),
        decode=partial(decode, vae),
        rewards=scorers.Scorers(config.reward.scorer, config.paths, config.reward.http, fps=16),
        watch=scorers.Scorers(config.eval.scorer, config.paths, config.reward.http, fps=16),
        to_pixel=composite.latent_to_pixel,
        side=vae.spatial_factor,
        fps=16,
        rows=config.video.height,
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of backbone.

    Attributes:
      make: (config) -> Backbone; nothing large is read yet.
      files: fields of FILES that it cannot do without.
    """

    make: Callable[[ml_collections.ConfigDict], Backbone]
    files: tuple[str, ...] = ()


WANS = ("longlive", "memflow", "self_forcing", "causal_forcing", "krea14b")
WAN_FILES = ("weights", "paths.vae", "paths.prompts")
BACKBONES: Registry[Kind] = Registry(
    "backbone",
    {**dict.fromkeys(TOYS, Kind(sized_toy)), **dict.fromkeys(WANS, Kind(wan_backbone, WAN_FILES))},
)


def load(config: ml_collections.ConfigDict) -> Backbone:
    """The backbone that config.backbone names; UsageError as `check_tasks`."""
    check_tasks(config)
    return BACKBONES[config.backbone].make(config)


def check_rewards(config: ml_collections.ConfigDict, backbone: Backbone) -> None:
    """UsageError for a reward that is none, cannot be imported or asked, or cannot be weighed."""
    if whole := [x for x in scorers.names_of(config.reward.scorer) if x in scorers.OF_VIDEOS]:
        raise UsageError(
            f"config.reward.scorer={config.reward.scorer}: {whole[0]} compares the frames of whole"
            " videos, which is watched and not optimised; name it in config.eval.scorer"
        )
    backbone.rewards.check()
    backbone.watch.check()
    optimised, watched = backbone.rewards.components(), backbone.watch.components()
    composite.check_weights(optimised, watched, config.reward.weights)


# ---------------------------------------------------------------- its files

# Where each file that a configuration may name comes from.
FILES = {
    "weights": "made by: kvpo-convert CHECKPOINT --output=FILE",
    "paths.lora": "made by: kvpo-convert LORA --output=FILE",
    "paths.vae": "made by: kvpo-convert Wan2.1_VAE.pth --output=FILE",
    "paths.hpsv3": "made by: kvpo-convert HPSV3 --output=FILE ... (docs/rewards.md)",
    "paths.videoalign": "made by: kvpo-convert VIDEOREWARD --output=FILE ... (docs/rewards.md)",
    "paths.clip": "made by: kvpo-convert CLIP_FOLDER --output=FILE (docs/evaluation.md)",
    "paths.dino": "made by: kvpo-convert dino_vitbase16_pretrain.pth --output=FILE",
    "paths.aesthetic": "made by: kvpo-convert HEAD --base=CLIP_L14 --output=FILE"
    " (docs/evaluation.md)",
    "paths.umt5": "made by: kvpo-convert models_t5_umt5-xxl-enc-bf16.pth --output=FILE",
    "paths.tokenizer": "the folder google/umt5-xxl of a Wan2.1 checkpoint",
    "paths.embeddings": "made by: kvpo-encode --prompts=FILE --output=FOLDER ...",
    "paths.prompts": "a file of prompt sequences, see docs/data.md",
}
FOLDERS = ("paths.tokenizer", "paths.embeddings")


def check_files(
    config: ml_collections.ConfigDict, scored: bool = True, listed: bool = True
) -> None:
    """UsageError for a file that is needed and not named, or named and not there.

    Sentences are encoded with paths.embeddings, or else with paths.umt5 and paths.tokenizer.

    Args:
      config: of the run.
      scored: whether videos are scored, as in training.
      listed: whether prompts are read from config.paths.prompts, as in training.
    """
    fields = config_lib.flat(config)
    needs: dict[str, str] = {}
    if files := BACKBONES[config.backbone].files:
        encoder = ("paths.umt5", "paths.tokenizer")
        files += ("paths.embeddings",) if config.paths.embeddings else encoder
        wanted = [name for name in files if listed or name != "paths.prompts"]
        needs |= dict.fromkeys(wanted, f"the {config.backbone} backbone")
    if scored:
        named = scorers.names_of(f"{config.reward.scorer},{config.eval.scorer}")
        learned = [name for name in scorers.LEARNED if name in named]
        needs |= {f"paths.{name}": f"the scorer {name}" for name in learned}
    for name, what in needs.items():
        if not fields[name]:
            source = FILES[name]
            if name in ("paths.umt5", "paths.tokenizer"):
                source += " (or name config.paths.embeddings)"
            raise UsageError(f"{what} needs --config.{name}=..., {source}")
    check_there(config, FILES)


def check_there(config: ml_collections.ConfigDict, names: Iterable[str]) -> None:
    """UsageError for a file that the config names in one of these fields and that is not there."""
    fields = config_lib.flat(config)
    for name in names:
        source = FILES[name]
        if fields[name] and not Path(fields[name]).exists():
            raise UsageError(f"config.{name}={fields[name]}: there is no such file ({source})")
        if fields[name] and Path(fields[name]).is_dir() != (name in FOLDERS):
            expected = "folder" if name in FOLDERS else "file"
            raise UsageError(f"config.{name}={fields[name]} is no {expected} ({source})")


def files_read(config: ml_collections.ConfigDict) -> dict[str, Path]:
    """What a run's numbers depend on beside its configuration, by what names it there.

    The files and folders of FILES, and the modules of scorers "module:function".
    """
    fields = config_lib.flat(config)
    files = {f"config.{name}": Path(fields[name]) for name in FILES if fields[name]}
    if not config.weights and (shipped := shipped_weights(config)):
        files["config.weights"] = shipped
    modules = scorers.sources(f"{config.reward.scorer},{config.eval.scorer}")
    return files | {f"scorer {name}": path for name, path in modules.items()}
