"""Streams videos from a generator, block by block, into mp4 files.

    python -m kvpo_jax.generate --prompt="a red disk moves left"
    python -m kvpo_jax.generate --checkpoint=runs/tiny-... --prompts=prompts.txt --output=videos
    python -m kvpo_jax.generate --config=configs/longlive.py --checkpoint=longlive.safetensors \\
        --lora=lora.safetensors --config.paths.vae=... --config.paths.umt5=... --config.paths.tokenizer=... \\
        --interactive

--checkpoint is a run directory (its online policy, or with --ema its average) or a converted base model. A prompt
sequence switches at --switch_frames, or evenly; with --interactive, whenever a line is typed.
"""

from __future__ import annotations

import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import config as config_lib
from kvpo_jax import rollout, sharding, train
from kvpo_jax.data import prompts
from kvpo_jax.models.wan import wan_config
from kvpo_jax.types import Array, PyTree

SMALLEST = 128  # pixels; smaller videos are enlarged by a whole factor, or no player shows them

# ---------------------------------------------------------------- the stream


def stream(
    stages: rollout.Stages,
    config: ml_collections.ConfigDict,
    embed: Callable[[Sequence[str]], np.ndarray],
    variables: PyTree,
    key: rollout.NoiseKey,
    sentence_at: Callable[[int], str],
    blocks: int,
) -> Iterator[Array]:
    """Yields the clean latents float[1, F, Y, X, C] of one video, block by block.

    Args:
      stages: from `rollout.build`.
      config: the config that the stages were built with.
      embed: sentences -> float[n, K, text_dim].
      variables: {"params": ..., "lora": ...}.
      key: of the noise.
      sentence_at: first frame of a block -> its sentence. Where it changes, the last frames' keys and values are made
        anew with the new sentence, as LongLive switches prompts.
      blocks: how many.
    """
    frames = config.video.block_frames
    keep = config.window.recache_frames // frames
    history, recent, sentence = stages.blank(1), [], None
    for block in range(blocks):
        frame = block * frames
        new = sentence_at(frame)
        if new != sentence:
            text = stages.encode_text(variables, jnp.asarray(embed([new]))[:, None])
            if recent:
                latents = jnp.concatenate(recent, axis=1)
                history = stages.shared_recache(
                    variables, text, 0, np.array([True]), history, latents, frame - latents.shape[1]
                )
            sentence = new
        x, history = stages.shared_block(variables, text, 0, history, key, frame)
        recent = [*recent, x][-keep:]
        yield x


def switches(segments: int, blocks: int, block_frames: int) -> tuple[int, ...]:
    """Latent frames at which the segments after the first begin, evenly, on block borders."""
    if segments > blocks:
        raise ValueError(f"{segments} prompts do not fit into {blocks} blocks; raise --num_frames")
    return tuple(round(m * blocks / segments) * block_frames for m in range(1, segments))


def given_switches(given: Sequence[str], block_frames: int, frames: int) -> tuple[int, ...]:
    """The frames that --switch_frames lists, as good as those of config.video.switch_frames."""
    flag = f"--switch_frames={','.join(given)}"
    try:
        switch_frames = tuple(map(int, given))
    except ValueError as error:
        raise ValueError(f"{flag}: expected latent frames, as in 12,24") from error
    config_lib.check_switches(flag, switch_frames, block_frames, frames)
    return switch_frames


def schedule(sentences: Sequence[str], switch_frames: Sequence[int]) -> Callable[[int], str]:
    """`sentence_at` of a prompt sequence."""
    return lambda frame: sentences[rollout.segment_of(frame, switch_frames)]


def typed(lines: Iterator[str]) -> Callable[[int], str]:
    """`sentence_at` of what is typed: the newest line that is not empty; the first is waited for.

    ValueError if there is none before the lines end; later the last one stays.
    """
    waiting: queue.Queue[str | None] = queue.Queue()

    def listen():
        try:
            for line in lines:
                if line.strip():
                    waiting.put(line.strip())
        finally:
            waiting.put(None)

    threading.Thread(target=listen, daemon=True).start()
    current = None

    def sentence_at(frame: int) -> str:
        nonlocal current
        if current is None:
            print("type a prompt, and while the video streams the next ones:", flush=True)
            current = waiting.get()
            if current is None:
                raise ValueError("--interactive: the input ended before a prompt was typed")
        while not waiting.empty():
            current = waiting.get() or current
        return current

    return sentence_at


# ---------------------------------------------------------------- files


def writer(path: Path, height: int, width: int, fps: int):
    """A started mp4 writer (`send` uint8[height, width, 3] frames, `close`); what is sent before a kill plays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, quality=8, macro_block_size=2,
        output_params=["-movflags", "frag_keyframe+empty_moov"],
    )  # fmt: skip
    out.send(None)
    return out


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """uint8[frames, h, w, 3] of pixels uint8 or in [0, 1], by a whole factor no smaller than SMALLEST."""
    factor = -(-SMALLEST // min(pixels.shape[1:3]))
    if pixels.dtype != np.uint8:
        pixels = np.clip(np.round(255 * pixels), 0, 255).astype(np.uint8)
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else pixels


def name_of(index: int, videos: int, sentence: str) -> str:
    """A file name that tells the videos apart; in the order of the names they are in that of their index."""
    words = re.sub(r"[^a-z0-9]+", "_", sentence.lower()).strip("_")
    return f"{index:0{max(3, len(str(videos - 1)))}d}_{words[:48]}.mp4"


def write_video(
    path: Path,
    backbone: backbone_lib.Backbone,
    decoder: PyTree,
    latents: Iterator[Array],
    blocks: int,
    sentence: Callable[[], str],
) -> int:
    """Decodes and writes blocks as they come, with a progress line; returns the number of pixel frames."""
    decode = jax.jit(backbone.decode)
    state, out, frames, begin = None, None, 0, time.monotonic()
    try:
        for block, x in enumerate(latents):
            pixels, state = decode(decoder, x, state)
            images = enlarge(np.asarray(pixels[0]))
            if out is None:
                out = writer(path, *images.shape[1:3], backbone.fps)
            for image in images:
                out.send(np.ascontiguousarray(image))
            frames += len(images)
            seconds = time.monotonic() - begin
            if block == 0:
                first = seconds  # compiles
            rate = (seconds - first) / block if block else seconds
            print(
                f"\r{path.name}  block {block + 1}/{blocks}  {frames} frames  {rate:.2f} s/block  "
                f"{frames / seconds:.1f} frames/s  {rate * (blocks - block - 1):.0f} s left  {sentence()[:60]!r}",
                end="", flush=True,
            )  # fmt: skip
    finally:
        print(flush=True)
        if out is not None:
            out.close()
    return frames


# ---------------------------------------------------------------- entry


def load_policy(
    config: ml_collections.ConfigDict, backbone: backbone_lib.Backbone, workdir: Path | None, lora: str, ema: bool
) -> PyTree:
    """{"params", "lora"}: the base with the LoRA of a run, of a converted file, of config.paths.lora, or none."""
    mesh = sharding.make_mesh(1, 1, 1, 1)
    state = train.init_state(config, train.make_optimiser(config.train), mesh, backbone.load_lora(None))
    if workdir is not None:
        _, state = train.newest_state(workdir, state)
    policy = state.ema if ema else state.lora
    if lora:
        policy = backbone_lib.load_lora(lora, wan_config(config))
    return {"params": backbone.load(None), "lora": policy}


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    path = Path(given.checkpoint) if given.checkpoint else None
    workdir = path if path is not None and path.is_dir() else None
    try:
        if path is not None and not path.exists():
            raise ValueError(f"--checkpoint={path}: there is no such run directory or converted checkpoint")
        if given.ema and workdir is None:
            raise ValueError("--ema needs --checkpoint to be a run directory")
        if sum(bool(x) for x in (given.prompt, given.prompts, given.interactive)) != 1:
            raise ValueError("give one of --prompt (once per segment), --prompts=FILE and --interactive")
        overrides = [*arguments[1:], *([f"--config.weights={path}"] if path and not workdir else [])]
        if (
            workdir and not given.config
        ):  # made with that run's configuration; what differs is this video's own business
            config = config_lib.override(config_lib.load_saved(workdir / "config.json"), overrides)
            config_lib.check(config)
        else:
            config = config_lib.resolve(given.config, None, overrides)
        config_lib.check_files(config, ("weights", "paths.vae"))
        if Path(given.output).is_file():
            raise ValueError(f"--output={given.output} is a file; name a folder")
        frames = given.num_frames or config.video.blocks * config.video.block_frames
        blocks, rest = divmod(frames, config.video.block_frames)
        if rest or blocks < 1:
            raise ValueError(f"--num_frames={frames} is not a multiple of {config.video.block_frames} latent frames")
        if frames > config_lib.MAX_FRAMES:
            raise ValueError(f"--num_frames={frames}, but there are positions for {config_lib.MAX_FRAMES} frames")
        if given.prompts:
            videos = [list(s.sentences) for s in prompts.load(Path(given.prompts))]
        else:
            videos = [given.prompt]
        if not config.window.recache_frames and any(len(v) != 1 for v in videos):  # typed ones switch too
            raise ValueError("config.window.recache_frames=0, but prompts switch")
        if given.interactive and given.switch_frames:
            raise ValueError("--switch_frames: with --interactive a prompt begins when it is typed")
        at = given_switches(given.switch_frames, config.video.block_frames, frames)
        timed = [at or switches(len(v), blocks, config.video.block_frames) for v in videos if v]
        for sentences, frames_at in zip(videos, timed, strict=False):
            if len(frames_at) != len(sentences) - 1:
                raise ValueError(
                    f"--switch_frames={','.join(given.switch_frames)}: {len(sentences)} prompts switch "
                    f"{len(sentences) - 1} times: {sentences}"
                )
        config_lib.use_compilation_cache()
        backbone = backbone_lib.load(config)
        variables = load_policy(config, backbone, workdir, given.lora, given.ema)
        stages, decoder = rollout.build(config, sharding.make_mesh(1, 1, 1, 1)), backbone.load_decoder(None)
    except (ValueError, OSError) as error:
        config_lib.explain(error)
    run = partial(stream, stages, config, backbone.embed, variables)
    for index, sentences in enumerate(videos):
        sentence_at = schedule(sentences, timed[index]) if sentences else typed(iter(sys.stdin))
        spoken = [""]

        def said(frame, sentence_at=sentence_at, spoken=spoken):
            spoken[0] = sentence_at(frame)
            return spoken[0]

        key = rollout.NoiseKey(rollout.stream(given.seed, "heldout", index), jnp.arange(1))
        file = Path(given.output) / name_of(index, len(videos), sentences[0] if sentences else "interactive")
        try:
            write_video(file, backbone, decoder, run(key, said, blocks), blocks, lambda spoken=spoken: spoken[0])
        except (ValueError, KeyError, OSError) as error:  # a sentence that cannot be encoded, a full disk
            config_lib.explain(error)
        print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "FILE[:PRESET]; default: configs/tiny.py, or that of the run in --checkpoint")
    flags.DEFINE_string("checkpoint", None, "run directory, or converted base model")
    flags.DEFINE_string("lora", "", "converted LoRA to use instead of the run's")
    flags.DEFINE_bool("ema", False, "the averaged policy of the run")
    flags.DEFINE_multi_string("prompt", [], "a sentence; once per segment")
    flags.DEFINE_string("prompts", "", "file of prompt sequences (docs/data.md); a video each")
    flags.DEFINE_bool("interactive", False, "read prompts from the terminal while the video streams")
    flags.DEFINE_list("switch_frames", [], "latent frames at which the next prompt begins; default: evenly")
    flags.DEFINE_integer("num_frames", 0, "latent frames; default: as long as the config's videos")
    flags.DEFINE_integer("seed", 0, "of the noise")
    flags.DEFINE_string("output", "videos", "folder for the mp4 files")
    app.run(main, flags_parser=config_lib.parse_flags)
