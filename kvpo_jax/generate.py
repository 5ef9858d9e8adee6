"""Streams videos from a generator, block by block, into mp4 files.

    python -m kvpo_jax.generate --prompt="a red disk moves left"
    python -m kvpo_jax.generate --checkpoint=runs/tiny-... --prompts=prompts.txt --output=videos
    python -m kvpo_jax.generate --config=configs/longlive.py --checkpoint=longlive.safetensors \\
        --lora=lora.safetensors --config.paths.vae=... --config.paths.umt5=... \\
        --config.paths.tokenizer=... --interactive

    python -m kvpo_jax.generate --branches=8 --pivot=6 --prompt="a red disk moves left"

--checkpoint is a run directory (its online policy, or with --ema its average) or a converted base
model. A prompt sequence switches at --switch_frames, or where the durations in its file say, or
evenly.

With --interactive every line that is typed, or comes from a pipe, is a prompt. Each takes over at
the next block, one per block in their order, and the last one stays. The video is made no faster
than it plays, so that there is time to type.

With --branches=K the video is an anchor, from which K branches part at block --pivot as in
training: by --explore=routing (Causal History Routing), or by --explore=noise of their own.
branches.jsonl beside the videos says how far apart they are, and branches.html shows them.

With --config.mesh.context=N so many devices share the tokens of every block of a video.
"""

from __future__ import annotations

import itertools
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh

from kvpo_jax import adapters as adapters_lib
from kvpo_jax import backbone as backbone_lib
from kvpo_jax import diversity
from kvpo_jax import run as run_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.data import prompts
from kvpo_jax.errors import UsageError, listed
from kvpo_jax.rollout import Spoken, stream
from kvpo_jax.run import Run
from kvpo_jax.runtime import command, progress, sharding, video, workdir
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import write_lines
from kvpo_jax.runtime.checkpoint import NEWEST, Which
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.state import policy_of, saved_state
from kvpo_jax.types import Array, PyTree

# ---------------------------------------------------------------- what is said when


class Speaker:
    """first frame of a block -> Spoken, for P videos, each with switches of its own.

    A sentence is encoded when it is said, and alone, so that its text does not depend on what is
    said in the other videos.

    Args:
      run: its text encoder and programs.
      variables: of the generating policy.
      sentence_at: of each video, first frame of a block -> its sentence.

    Attributes:
      sentences: what was said last.
    """

    def __init__(self, run: Run, variables: PyTree, *sentence_at: Callable[[int], str]):
        self._run, self._variables, self._sentence_at = run, variables, sentence_at
        self.sentences = [""] * len(sentence_at)  # which no prompt is
        self._text: Any = None

    def __call__(self, frame: int) -> Spoken:
        sentences = [at(frame) for at in self._sentence_at]
        pairs = zip(sentences, self.sentences, strict=True)
        changed = np.array([now != before for now, before in pairs])
        if changed.any():
            embed = self._run.backbone.embed
            embeddings = np.stack([np.asarray(embed([sentence])) for sentence in sentences])
            self._text = self._run.programs.encode_text(self._variables, embeddings)
            self.sentences = sentences
        return Spoken(self._text, 0, changed)


def switches(segments: int, blocks: int, block_frames: int) -> tuple[int, ...]:
    """Latent frames at which the segments after the first begin, evenly, on block borders."""
    if segments > blocks:
        raise UsageError(f"{segments} prompts do not fit into {blocks} blocks; raise --num_frames")
    return tuple(round(m * blocks / segments) * block_frames for m in range(1, segments))


def given_switches(given: Sequence[str], block_frames: int, frames: int) -> tuple[int, ...]:
    """The frames that --switch_frames lists, as good as those of config.video.switch_frames."""
    flag = f"--switch_frames={','.join(given)}"
    try:
        switch_frames = tuple(map(int, given))
    except ValueError as error:
        raise UsageError(f"{flag}: expected latent frames, as in 12,24") from error
    config_lib.check_switches(flag, switch_frames, block_frames, frames)
    return switch_frames


def sentence_schedule(
    sentences: Sequence[str], switch_frames: Sequence[int]
) -> Callable[[int], str]:
    """`sentence_at` of a prompt sequence."""
    return lambda frame: sentences[config_lib.segment_of(frame, switch_frames)]


def typed(
    lines: Iterator[str], check: Callable[[Sequence[str]], None], seconds: float
) -> Callable[[int], str]:
    """`sentence_at` of what is typed: the next line that is a prompt, or else the one before it.

    Args:
      lines: what is typed; empty lines mean nothing. The first prompt is waited for.
      check: raises a UsageError for sentences that cannot be encoded. It is printed, and the next
        line is taken instead.
      seconds: how long a block plays; the next one is not asked for its prompt earlier.

    Returns:
      A function that raises a UsageError if there is no prompt before the lines end.
    """
    waiting: queue.Queue[str | None] = queue.Queue()
    current: str | None = None
    due = 0.0

    def listen():
        try:
            for line in lines:
                if line.strip():
                    waiting.put(line.strip())
        finally:
            waiting.put(None)

    def next_line() -> str | None:
        """A line that is a prompt; None if there is none now, or if the lines have ended."""
        while current is None or not waiting.empty():
            line = waiting.get()
            if line is None:
                waiting.put(None)  # the end stays the end
                return None
            try:
                check([line])
                return line
            except UsageError as error:
                print(f"\n{error}; type another prompt", file=sys.stderr, flush=True)
        return None

    def sentence_at(frame: int) -> str:
        nonlocal current, due
        time.sleep(max(0.0, due - time.monotonic()))
        if current is None:
            print("type a prompt, and while the video streams the next ones;", flush=True)
            print("each takes over at the next block, one per block:", flush=True)
        current = next_line() or current
        if current is None:
            raise UsageError("--interactive: the input ended before a prompt was typed")
        due = time.monotonic() + seconds
        return current

    threading.Thread(target=listen, daemon=True).start()
    return sentence_at


# ---------------------------------------------------------------- files


def name_of(index: int, videos: int, sentence: str) -> str:
    """The file name of a video: its number, then its sentence. Sorted by name, videos are in order.

    Args:
      index: its number.
      videos: how many there are.
      sentence: the first that it is generated from.
    """
    return f"{index:0{max(3, len(str(videos - 1)))}d}_{prompts.slug(sentence)[:48]}.mp4"


def decoded(run: Run, latents: Iterable[Array]) -> Iterator[np.ndarray]:
    """The pixels [P, frames, h, w, 3] of the blocks float[P, F, Y, X, C] of videos as they come."""
    state = None
    for x in latents:
        pixels, state = run.decoder.block(x, state)
        yield np.asarray(pixels)


def write_video(
    path: Path,
    pixels: Iterator[np.ndarray],
    fps: float,
    blocks: int,
    speaker: Speaker | None = None,
) -> None:
    """Writes the blocks of a video as they come, and says how fast that was.

    Args:
      path: the file.
      pixels: of each block, [frames, h, w, 3].
      fps: frames per second.
      blocks: how many there are.
      speaker: of a video whose prompts are typed: a line for every prompt takes the place of a bar.

    Raises:
      UsageError, OSError: see `video.writing`.
    """
    frames, sentence = 0, ""
    begin, uncounted = time.monotonic(), 0
    with progress.bar(path.name, blocks, live=speaker is None) as advance, ExitStack() as stack:
        for block, made in enumerate(pixels):
            if speaker is not None and speaker.sentences[0] != sentence:
                sentence = speaker.sentences[0]
                progress.say(f"block {block + 1}/{blocks}: {sentence!r}")
            images = video.enlarge(made)
            if block == 0:
                height, width = images.shape[1:3]
                write = stack.enter_context(video.writing(path, height, width, fps))
            for image in images:
                write(image)
            frames += len(images)
            advance()
            if block == 0 and blocks > 1:  # it compiles
                begin, uncounted = time.monotonic(), frames
    rate = (frames - uncounted) / (time.monotonic() - begin)
    progress.say(f"wrote {path}: {frames} frames, {rate:.1f} frames/s")


def write_branches(
    run: Run,
    variables: PyTree,
    videos: Sequence[Video],
    names: Sequence[Mapping[str, str]],
    pivots: Sequence[int],
    seed: int,
    output: Path,
) -> None:
    """Writes anchor and branches of each prompt sequence, what they are, and how they differ.

    Args:
      run: of `diversity.config_of`.
      variables: of the generating policy.
      videos: the prompt sequences.
      names: of each, "anchor", "branch_0", ... -> file.
      pivots: of each, the first perturbed block.
      seed: of noise and draws.
      output: the folder.
    """
    rows = []
    configs = [diversity.switching(run.config, v.switch_frames) for v in videos]
    for index, (sentences, _, _) in enumerate(videos):
        pivot, files = pivots[index], names[index]
        one = replace(run, config=configs[index])
        rolled = diversity.sample(one, variables, sentences, seed, index, pivot)
        fork = run.backbone.to_pixel(pivot * run.config.video.block_frames)
        kept = []
        for name, latents in diversity.videos(rolled):
            made: list[np.ndarray] = []
            blocks = decoded(run, diversity.blocks_of(run.config, latents))
            write_video(
                output / files[name],
                keeping((block[0] for block in blocks), made),
                run.backbone.fps,
                run.config.video.blocks,
            )
            kept.append(np.concatenate(made)[fork:])
        scores = diversity.scored(one, sentences, rolled, pivot)
        sampled = diversity.Sampled(sentences, rolled, kept, scores)
        rows.append(diversity.record(run.config, sampled, pivot, files, seed))
        write_lines(rows, output / diversity.RECORDS)
        diversity.print_tables(rows[-1])
    diversity.write_page(rows, configs, output)
    progress.say(f"{output / diversity.PAGE} shows them")


def keeping(items: Iterable[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The items, each of which is also put into `kept`."""
    for item in items:
        kept.append(item)
        yield item


# ---------------------------------------------------------------- the command


class Video(NamedTuple):
    """A video to make.

    Attributes:
      sentences: its prompt sequence; empty if it is typed.
      switch_frames: latent frames at which the sentences after the first begin.
      blocks: how long it is.
    """

    sentences: Sequence[str]
    switch_frames: Sequence[int]
    blocks: int


def mesh_of_videos(config: ml_collections.ConfigDict, at_once: int) -> Mesh:
    """The mesh for so many videos at once, no more than this process has devices.

    Each has a device, or config.mesh.context of them. Where the devices do not suffice, it is the
    largest number that divides both config.mesh.context and the devices of a video. Likewise
    config.mesh.fsdp videos share the weights.
    """
    shards = math.gcd(at_once, config.mesh.fsdp)
    context = math.gcd(jax.local_device_count() // at_once, config.mesh.context)
    return sharding.make_mesh(at_once // shards, 1, at_once, 1, fsdp=shards, context=context)


def load_run(
    config: ml_collections.ConfigDict,
    checkpoint: Path | None,
    adapters: Sequence[adapters_lib.Adapter],
    policy_name: str,
    sentences: Sequence[str],
    which: Which = NEWEST,
    at_once: int = 1,
) -> tuple[Run, PyTree]:
    """The equipment and the variables of the policy, to generate these sentences.

    The policy is the base with the LoRA of a run directory, of converted files whose sizes the
    config has, of config.paths.lora, or none, the last of these that is given.

    Args:
      config: a checked one.
      checkpoint: a run directory, or None.
      adapters: files that are used instead of its LoRA.
      policy_name: which one of the run, see `state.policy_of`.
      sentences: the only ones that will be encoded.
      which: checkpoint of the run.
      at_once: videos, see `mesh_of_videos`.
    """
    run = run_lib.load(config, mesh_of_videos(config, at_once), sentences)
    if adapters:
        policy = adapters_lib.load(adapters, wan_config(config))
    elif checkpoint is not None:
        state = saved_state(checkpoint, config, run.mesh, which)
        progress.say(f"iteration {int(state.iteration)} of {checkpoint}")
        policy = policy_of(state, policy_name)
    else:
        policy = run.initial_lora()
    return run, run.variables(sharding.place_weights(policy, run.mesh))


def find_config(
    given: flags.FlagValues,
    arguments: Sequence[str],
    of_run: Mapping[str, bool],
    scored: bool = False,
) -> ml_collections.ConfigDict:
    """The configuration: --config, or that of the run in --checkpoint; with its files checked.

    Args:
      given: the flags --config, --checkpoint, --lora, --iteration and --output.
      arguments: --config.FIELD=VALUE.
      of_run: name of a further flag that only a run directory has an answer to -> whether it is
        given.
      scored: whether the videos will be scored.

    Raises:
      UsageError: flags do not go together, or a file is missing.
    """
    path = Path(given.checkpoint) if given.checkpoint else None
    run = path if path is not None and path.is_dir() else None
    if path is not None and not path.exists():
        raise UsageError(
            f"--checkpoint={path}: there is no such run directory or converted checkpoint"
        )
    for name, asked in {**of_run, "iteration": given.iteration != NEWEST}.items():
        if asked and run is None:
            raise UsageError(f"--{name} needs --checkpoint to be a run directory")
        if asked and given.lora:
            raise UsageError(f"--{name} is of the run, and --lora={given.lora} replaces its policy")
    overrides = [*arguments, *([f"--config.weights={path}"] if path and run is None else [])]
    if run is not None and not given.config:
        # Made with that run's configuration; what differs is this video's own business.
        config = config_lib.override(workdir.trained_config(run, given.iteration), overrides)
        config_lib.check(config)
    else:
        config = workdir.resolve(given.config, None, overrides)
    backbone_lib.check_files(config, scored=scored, listed=False)
    if Path(given.output).is_file():
        raise UsageError(f"--output={given.output} is a file; name a folder")
    return config


def find_videos(given: flags.FlagValues, config: ml_collections.ConfigDict) -> list[Video]:
    """The videos that the flags ask for."""
    if sum(bool(x) for x in (given.prompt, given.prompts, given.interactive)) != 1:
        raise UsageError(
            "give one of --prompt (once per segment), --prompts=FILE and --interactive"
        )
    if given.interactive and given.switch_frames:
        raise UsageError("--switch_frames: with --interactive a prompt begins when it is typed")
    sequences = [prompts.PromptSequence(tuple(given.prompt), 0)]
    if given.prompts:
        sequences = prompts.load(Path(given.prompts))
    check_switching(config, sequences)  # typed ones switch, too
    videos = [find_video(given, config, sequence) for sequence in sequences]
    if given.branches is not None and len({v.blocks for v in videos}) > 1:
        raise UsageError(
            "--branches: the videos have one length, and the durations of their prompts differ;"
            " name it with --num_frames"
        )
    return videos


def check_switching(
    config: ml_collections.ConfigDict, sequences: Sequence[prompts.PromptSequence]
) -> None:
    """UsageError unless the window can switch prompts, or none of the sequences asks for it."""
    if not config.window.recache_frames and any(len(s.sentences) != 1 for s in sequences):
        raise UsageError("config.window.recache_frames=0, but prompts switch")


def scheduled(
    sequence: prompts.PromptSequence, path: Path | str, frames: int, block_frames: int
) -> tuple[int, ...]:
    """The latent frames of a video at which its prompts switch: by their durations, or evenly.

    Args:
      sequence: its prompts.
      path: the file that they are from.
      frames: of the video.
      block_frames: F.

    Raises:
      UsageError: the durations are not whole blocks of such a video, or there are too many prompts.
    """
    if not sequence.durations:
        return switches(len(sequence.sentences), frames // block_frames, block_frames)
    where = f"{path}:{sequence.line}: durations {list(sequence.durations)}"
    switch_frames = prompts.switch_frames(sequence)
    config_lib.check_switches(where, switch_frames, block_frames, frames)
    return switch_frames


def find_video(
    given: flags.FlagValues, config: ml_collections.ConfigDict, sequence: prompts.PromptSequence
) -> Video:
    """The video of a prompt sequence.

    Its prompts switch as --switch_frames says, or as long as each lasts, or evenly. It is as long
    as --num_frames says, or its prompts, or the config.
    """
    sentences, block_frames = sequence.sentences, config.video.block_frames
    timed = () if given.switch_frames else sequence.durations
    frames = frames_of(given, config, sum(timed))
    if given.switch_frames:
        switch_frames = given_switches(given.switch_frames, block_frames, frames)
    elif given.interactive:
        switch_frames = ()
    else:
        switch_frames = scheduled(sequence, given.prompts, frames, block_frames)
    if sentences and len(switch_frames) != len(sentences) - 1:
        raise UsageError(
            f"--switch_frames={','.join(given.switch_frames)}: {len(sentences)} prompts switch "
            f"{len(sentences) - 1} times: {list(sentences)}"
        )
    return Video(sentences, switch_frames, frames // block_frames)


def frames_of(
    given: flags.FlagValues,
    config: ml_collections.ConfigDict,
    lasting: int = 0,
    default: int | None = None,
) -> int:
    """Latent frames of a video.

    Args:
      given: the flag --num_frames, which comes first.
      config: of the run.
      lasting: those of its prompts, 0 if they do not say.
      default: where neither says; None: those of the config.

    Raises:
      UsageError: they are no whole blocks, or too many.
    """
    block_frames = config.video.block_frames
    default = config.video.blocks * block_frames if default is None else default
    frames = given.num_frames or lasting or default
    asked = bool(given.num_frames or not lasting)
    what = f"--num_frames={frames}" if asked else f"a prompt sequence of {frames} frames"
    if frames % block_frames or frames < block_frames:
        raise UsageError(f"{what} is not a multiple of {block_frames} latent frames")
    config_lib.check_positions(config, what, frames)
    return frames


def find_pivots(
    given: flags.FlagValues, config: ml_collections.ConfigDict, videos: Sequence[Video]
) -> list[int]:
    """The pivot of each video; empty unless there are --branches."""
    if given.branches is None:
        for name in ("pivot", "explore"):
            if given[name].value is not None:
                raise UsageError(f"--{name} is of --branches; give their number")
        return []
    if given.interactive:
        raise UsageError("--branches: they share their prompts, so --interactive has no use")
    switched = [diversity.switching(config, v.switch_frames) for v in videos]
    return [diversity.check_pivot(config, given.pivot) for config in switched]


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    config = find_config(given, arguments[1:], {"ema": given.ema})
    adapters = adapters_lib.parse(given.lora) if given.lora else []
    config = adapters_lib.configured(config, adapters) if adapters else config
    videos = find_videos(given, config)
    if given.branches is not None:
        frames = videos[0].blocks * config.video.block_frames
        config = diversity.config_of(config, given.branches, frames, given.explore)
    pivots = find_pivots(given, config, videos)
    video.ffmpeg()  # without it nothing can be written
    firsts = [v.sentences[0] if v.sentences else "interactive" for v in videos]
    names = [name_of(index, len(videos), first) for index, first in enumerate(firsts)]
    of_branches = [diversity.file_names(name, given.branches) for name in names if pivots]
    output = Path(given.output)
    files = names
    if pivots:
        beside, of_each = (diversity.RECORDS, diversity.PAGE), (x.values() for x in of_branches)
        files = [*beside, *itertools.chain(*of_each)]
    if replaced := [name for name in files if (output / name).exists()]:
        print(f"to be replaced in {output}: {listed(replaced)}", flush=True)
    command.use_compilation_cache()
    checkpoint = Path(given.checkpoint) if given.checkpoint else None
    checkpoint = checkpoint if checkpoint is not None and checkpoint.is_dir() else None
    spoken = [sentence for v in videos for sentence in v.sentences]
    with progress.bar("preparing"):
        policy = "ema" if given.ema else "online"
        of_videos = config if pivots else config_lib.generating(config)
        run, variables = load_run(of_videos, checkpoint, adapters, policy, spoken, given.iteration)
    if pivots:
        write_branches(run, variables, videos, of_branches, pivots, given.seed, output)
        return
    for index, (sentences, switch_frames, blocks) in enumerate(videos):
        if sentences:
            sentence_at = sentence_schedule(sentences, switch_frames)
        else:
            first, second = (run.backbone.to_pixel(n * config.video.block_frames) for n in (1, 2))
            seconds = (second - first) / run.backbone.fps
            sentence_at = typed(iter(sys.stdin), run.backbone.check_sentences, seconds)
        speaker = Speaker(run, variables, sentence_at)
        number = np.zeros(1, np.int32)
        noise = keys.NoiseKey(keys.draw_key(given.seed, "heldout", index), number)
        latents = (x for x, _ in stream(run, variables, speaker, noise, blocks))
        typing = speaker if given.interactive else None
        pixels = (block[0] for block in decoded(run, latents))
        write_video(output / names[index], pixels, run.backbone.fps, blocks, typing)


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string(
        "config",
        None,
        "FILE[:PRESET]; default: configs/tiny.py, or that of the run in --checkpoint",
    )
    command.define_path("checkpoint", None, "run directory, or converted base model")
    command.define_iteration()
    flags.DEFINE_string(
        "lora", "", "converted LoRA to use instead of the run's, or a sum of several: A:1.0,B:0.5"
    )
    flags.DEFINE_bool("ema", False, "the averaged policy of the run")
    flags.DEFINE_multi_string("prompt", [], "a sentence; once per segment")
    command.define_path("prompts", "", "file of prompt sequences (docs/data.md); a video each")
    flags.DEFINE_bool("interactive", False, "read prompts from the terminal while it streams")
    flags.DEFINE_list(
        "switch_frames",
        [],
        "latent frames at which the next prompt begins; default: durations of the file, or evenly",
    )
    flags.DEFINE_integer(
        "num_frames", 0, "latent frames; default: as the prompts last, or the config"
    )
    flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0, upper_bound=config_lib.SEEDS - 1)
    flags.DEFINE_integer(
        "branches", None, "also so many branches that part from the video at a block", lower_bound=1
    )
    flags.DEFINE_integer("pivot", None, "that block; default: the first that can be it")
    flags.DEFINE_enum(
        "explore",
        None,
        list(diversity.EXPLORE),
        "what makes them differ: routed history, or noise of their own; default: what the run has",
    )
    command.define_path("output", "videos", "folder for the mp4 files")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.generate", define_flags, main)


if __name__ == "__main__":
    cli()
