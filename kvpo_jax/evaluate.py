"""Held-out rewards of a run, or the scores of video files.

    python -m kvpo_jax.evaluate --workdir=runs/tiny-... [--iteration=24] [--config.eval.prompts=64]
    python -m kvpo_jax.evaluate --videos=DIR --prompts=FILE --rewards=motion \\
        [--hpsv3=FILE] [--videoalign=FILE] [--clip=FILE] [--dino=FILE] [--aesthetic=FILE]
    python -m kvpo_jax.evaluate --export=vbench|vbench_long|custom --prompts=FILE --output=DIR \\
        [--extended=FILE] [--flickering=FILE] [--samples=5] [--seed=0] [--workdir=RUN]
    python -m kvpo_jax.evaluate --import=DIR
    python -m kvpo_jax.evaluate --suite=short|long --prompts=FILE --output=DIR --checkpoint=RUN \\
        [--policy=reference|online|ema] [--iteration=24] [--lora=A:1.0,B:0.5] [--extended=FILE] \\
        [--samples=5] [--seed=0] [--num_frames=N] [--against=DIR] [--segment_clips]

The first compares reference, online and EMA policy on the same prompts and noise, and with --lora
the base with a converted LoRA, or a sum of several (--lora=A:1.0,B:0.5). The second scores
the videos of a folder as training does: a clip in the middle of every segment. Videos that are
named by their prompts belong to those, others to the prompt sequences in the order of their names
(2.mp4 before 10.mp4). The third writes what VBench needs, in an environment of its own, and the
fourth reads its results. The last generates the videos of a list of prompts, scores them and
compares policies, resumably and on any number of devices and processes (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from flax import struct
from PIL.Image import Image

from kvpo_jax import adapters as adapters_lib
from kvpo_jax import backbone as backbone_lib
from kvpo_jax import budget, fitting, suite, vbench
from kvpo_jax import programs as programs_lib
from kvpo_jax import run as run_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.algorithm.block import join_blocks
from kvpo_jax.data import prompts, return_world, toy_world
from kvpo_jax.data.vbench import FILTERED, SAMPLES
from kvpo_jax.errors import DivergedError, UsageError
from kvpo_jax.programs import APPEARANCE
from kvpo_jax.rewards import composite, scorers, video_files
from kvpo_jax.rollout import generate
from kvpo_jax.run import Run
from kvpo_jax.runtime import (
    checkpoint,
    command,
    page,
    pictures,
    progress,
    sharding,
    statistics,
    sums,
)
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib
from kvpo_jax.runtime.atomic import replacing, write_json
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.runtime.metrics import as_lists
from kvpo_jax.runtime.pictures import PICTURED
from kvpo_jax.state import POLICIES, policy_of, saved_state
from kvpo_jax.types import Array, Pixels, PromptBatch, PyTree

# ---------------------------------------------------------------- held-out evaluation


class Heldout(struct.PyTreeNode):
    """Videos of one policy on the held-out prompts.

    Attributes:
      pixels: uint8[m, shown, h, w, 3], the frames that a picture shows of the first m <= PICTURED
        prompts, on the main process; nothing where no videos are asked for.
      reward: float[n], the composite reward.
      components: name -> float[n], of what is optimised and of what is only watched
        (config.eval.scorer).
      blocks: float[n, B], the composite reward of each block alone; [n, 0] unless eval.by_block.
      appearance: name -> float[n], of the pixels that are scored, see `programs.appearance`.
      similarity: float[n, lags], of the latent frames up to the last that is scored, see
        `programs.self_similarity`.
    """

    pixels: np.ndarray
    reward: np.ndarray
    components: dict[str, np.ndarray]
    blocks: np.ndarray
    appearance: dict[str, np.ndarray] = struct.field(default_factory=dict)
    similarity: np.ndarray = struct.field(default_factory=partial(np.zeros, (0, 0)))


Film = Callable[[int, np.ndarray], None]


def evaluate(run: Run, lora: PyTree, film: Film | None = None) -> Heldout:
    """Generates and scores every held-out prompt with the policy of this LoRA tree.

    The noise depends on the prompt's index alone, so all policies of a run get the same.

    Args:
      run: of the evaluation.
      lora: of the policy.
      film: is given each of the first PICTURED prompts and its whole video uint8[frames, h, w, 3],
        on the main process. Either all processes give one, or none.
    """
    config, to_pixel = run.config, run.backbone.to_pixel
    windows = backbone_lib.windows_read(config, to_pixel)
    made_frames = backbone_lib.blocks_read(config, to_pixel, windows) * config.video.block_frames
    count = config_lib.heldout_at_once(config, sharding.prompt_shards(run.mesh))
    own = sharding.own_prompts(run.mesh, count)
    shown = backbone_lib.heldout_shown(config, run.backbone)
    pixels: dict[int, np.ndarray] = {}
    components, similarity = [], []
    batches = range(0, config.eval.prompts, count)
    for first in progress.steps(batches, "held-out prompts", size=count):
        numbers = np.arange(first, first + count, dtype=np.int32)
        batch = backbone_lib.prompt_batch(run.backbone, run.mesh, "heldout", 0, numbers)
        filmed = 0 if film is None else min(count, max(0, PICTURED - first))
        latents = _latents(run, lora, batch, whole=filmed > 0)
        made = jax.tree.map(sharding.own_part, run.decoder.videos(latents, windows))
        sentences = [batch.sentences[i] for i in own]
        scores = sharding.gather(partial(_scores, run, made, sentences), run.mesh)
        similarity.append(sharding.whole(run.programs.self_similarity(latents, made_frames)))
        del made
        if film is not None:
            for number, video in run.decoder.films(latents, filmed):
                pixels[first + number] = video[shown]
                film(first + number, video)
        components.append({name: np.asarray(value)[:, 0] for name, value in scores.items()})
    backbone_lib.release_rewards(config, run.backbone)
    merged = {name: np.concatenate([c[name] for c in components]) for name in components[0]}
    alone = range(len(backbone_lib.block_clips(config, run.backbone.to_pixel)))
    blocks = np.array([merged.pop(_block(b)) for b in alone]).reshape(-1, config.eval.prompts).T
    appearance = {name: merged.pop(_look(name)) for name in APPEARANCE}
    reward = np.asarray(composite.composite(merged, config.reward.weights))
    pictured = np.array([pixels[i] for i in sorted(pixels)])
    return Heldout(pictured, reward, merged, blocks, appearance, np.concatenate(similarity))


def _latents(run: Run, lora: PyTree, batch: PromptBatch, whole: bool = False) -> Array:
    """float[P, 1, frames, Y, X, C]: videos as far as rewards read them, or whole ones.

    A function of its own, so that the KV cache is freed before decoding. DivergedError if they are
    not finite.
    """
    config, to_pixel = run.config, run.backbone.to_pixel
    windows = backbone_lib.windows_read(config, to_pixel, whole=whole)
    noise = keys.NoiseKey(keys.draw_key(0, "heldout", 0), batch.numbers)
    read = backbone_lib.blocks_read(config, to_pixel, windows)
    blocks = generate(run, run.variables(lora), batch, noise, read)
    latents = join_blocks(blocks, axis=1, count=config.video.blocks)[:, None]
    del blocks
    if not run.programs.all_finite(latents):
        raise DivergedError(
            "the held-out videos of a policy are not finite: its weights are at fault, or its "
            f"updates (config.train.learning_rate={config.train.learning_rate})"
        )
    return latents


def _scores(
    run: Run, pixels: Pixels, sentences: Sequence[Sequence[str]]
) -> dict[str, Array | np.ndarray]:
    """Name -> float[P, 1]: components, optimised and watched, blocks, and appearance."""
    config, backbone = run.config, run.backbone

    def rewards_of(clips: Sequence[composite.Clip]) -> dict[str, np.ndarray]:
        return composite.segment_rewards(backbone.rewards, pixels, sentences, clips)

    clips = backbone_lib.scored_clips(config, backbone.to_pixel)
    starts = backbone_lib.block_starts(config, backbone.to_pixel)
    rewards = rewards_of(clips)
    watched = composite.segment_rewards(backbone.watch, pixels, sentences, clips)
    watched |= composite.video_rewards(backbone.watch.of_videos, pixels, sentences, clips, starts)
    composite.check_weights(rewards, watched, config.reward.weights)
    alone = enumerate(backbone_lib.block_clips(config, backbone.to_pixel))
    blocks = {
        _block(number): composite.composite(rewards_of([clip]), config.reward.weights)
        for number, clip in alone
    }
    count = backbone_lib.scored_frames(config, backbone.to_pixel)
    looks = run.programs.appearance(pixels.videos, count)
    return rewards | watched | blocks | {_look(name): x for name, x in looks.items()}


def _block(number: int) -> str:
    """What the score of a block alone is called among the components."""
    return f"block {number}"


def _look(name: str) -> str:
    """What a figure of `programs.appearance` is called among the components."""
    return f"look {name}"


def kept_reference(run: Run, workdir: Path, make: Callable[[], Heldout]) -> Heldout:
    """The evaluation of the reference policy, which a run keeps in WORKDIR/reference.npz.

    It is made anew where what it depends on is not the same: configuration, files, versions,
    devices.

    Args:
      run: of the evaluation.
      workdir: the run directory.
      make: evaluates the reference policy.
    """
    seen = {
        name: value
        for name, value in config_lib.flat(run.config).items()
        if name.startswith("eval.") or not name.startswith(config_lib.RESUMABLE)
    }
    made_of = sums.of_json([seen, run.files, dict(run.mesh.shape), workdir_lib.versions()])
    path = workdir / "reference.npz"
    kept = _load_heldout(path, made_of)
    if not sharding.any_process(kept is None):
        assert kept is not None
        return kept
    made = make()
    if sharding.is_main():
        _save_heldout(path, made_of, made)
    return made


def _save_heldout(path: Path, made_of: str, made: Heldout) -> None:
    arrays: dict[str, Any] = {
        "made_of": np.asarray(made_of),
        "reward": made.reward,
        "pixels": made.pixels,
        "blocks": made.blocks,
        "similarity": made.similarity,
        **{f"component {name}": x for name, x in made.components.items()},
        **{_look(name): x for name, x in made.appearance.items()},
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _load_heldout(path: Path, made_of: str) -> Heldout | None:
    """What `_save_heldout` wrote; None if it is of something else, or damaged."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        if str(arrays["made_of"]) != made_of:
            return None
        pixels, reward, blocks, similarity = (
            arrays[name] for name in ("pixels", "reward", "blocks", "similarity")
        )
        appearance = {name: arrays[_look(name)] for name in APPEARANCE}
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return None
    start = "component "
    components = {
        name.removeprefix(start): x for name, x in arrays.items() if name.startswith(start)
    }
    return Heldout(pixels, reward, components, blocks, appearance, similarity)


def heldout_metrics(
    reference: Heldout, online: Heldout, ema: Heldout, first_pivot: int
) -> dict[str, float]:
    """The mean held-out rewards of the three policies, as metrics.jsonl has them.

    With eval.by_block also what the online policy gains in the blocks before every pivot, which no
    replay ever reads, and in the others. Of every policy, what its videos look like.
    """
    means = {
        "heldout_reference": reference.reward.mean(),
        "heldout_online": online.reward.mean(),
        "heldout_ema": ema.reward.mean(),
    }
    looks = {
        f"heldout_{name}_{policy}": values.mean()
        for policy, made in (("reference", reference), ("online", online), ("ema", ema))
        for name, values in made.appearance.items()
    }
    return means | gains_by_block(reference, online, first_pivot) | looks


def gains_by_block(reference: Heldout, policy: Heldout, first_pivot: int) -> dict[str, float]:
    """What a policy gains in the blocks before every pivot, and in the others; {} without them."""
    if not reference.blocks.size:
        return {}
    gains = (policy.blocks - reference.blocks).mean(axis=0)
    return {
        "heldout_gain_before_pivots": gains[:first_pivot].mean(),
        "heldout_gain_from_pivots": gains[first_pivot:].mean(),
    }


def heldout_record(run: Run, results: Mapping[str, Heldout]) -> dict[str, Any]:
    """What heldout.jsonl has of an evaluation; docs/runs.md says what is in it."""
    weights = run.config.reward.weights
    return {
        "prompt": [run.backbone.prompts("heldout", i) for i in range(run.config.eval.prompts)],
        "reward": {policy: as_lists(result.reward) for policy, result in results.items()},
        "components": {
            policy: {name: as_lists(x) for name, x in result.components.items()}
            for policy, result in results.items()
        },
        "optimised": [name for name, weight in weights.items() if weight],
        "first_pivot": run.pivots[0],
        "blocks": {
            policy: as_lists(result.blocks.mean(axis=0))
            for policy, result in results.items()
            if result.blocks.size
        },
        "self_similarity": {
            policy: as_lists(result.similarity.mean(axis=0))
            for policy, result in results.items()
            if result.similarity.size
        },
    }


def drawn(run: Run, results: Mapping[str, Heldout]) -> Image:
    """What the reference and the online policy make of the first held-out prompts."""
    reference, online = results["reference"], results["online"]
    shown = min(len(reference.pixels), len(online.pixels))
    return pictures.before_after(
        [run.backbone.prompts("heldout", i) for i in range(shown)],
        backbone_lib.switch_pixels(run.config, run.backbone),
        backbone_lib.heldout_shown(run.config, run.backbone),
        {"before": reference.pixels[:shown], "after": online.pixels[:shown]},
        {"before": reference.reward, "after": online.reward},
    )


def finish(
    run: Run,
    workdir: Path,
    results: Mapping[str, Heldout],
    seconds: Mapping[str, float],
    iterations: int,
) -> dict[str, Any]:
    """Leaves summary.json and the report in `workdir`, and prints the final table.

    Args:
      run: tells the held-out prompts.
      workdir: the run directory.
      results: of the policies "reference", "online" and "ema".
      seconds: what they were spent on, with "total".
      iterations: how many have been made.

    Returns:
      The summary.
    """
    reference, online = results["reference"], results["online"]
    spent = budget.of_first(run, iterations)
    components = {
        policy: {name: float(np.mean(value)) for name, value in result.components.items()}
        for policy, result in results.items()
    }
    summary = {
        "heldout": statistics.heldout_summary(
            reference.reward, online.reward, results["ema"].reward
        ),
        "components": components,
        "reward_by_block": {
            policy: result.blocks.mean(axis=0).tolist() for policy, result in results.items()
        },
        "iterations": iterations,
        **spent.metrics(),
        "passes_with_another_iteration": (spent + budget.of_next(run, iterations)).passes,
        "eval": run.config.eval.to_dict(),
        "seconds": dict(seconds),
    }
    picture = workdir / "report" / "before_after.png"
    pictures.save(drawn(run, results), picture)
    write_json(summary, workdir / "summary.json")
    print(flush=True)
    print_table(results)
    first = run.pivots[0]
    if gains := tuple(gains_by_block(reference, online, first).values()):
        early = f"{gains[0]:+.4f} in blocks 0 to {first - 1}, which no replay reads"
        progress.say(f"\nonline gains {early}, and {gains[1]:+.4f} in the later ones")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    progress.say(f"\nseconds: {seconds['total']:.1f} in all ({parts})")
    progress.say(f"spent: {spent.passes:,} passes, {spent.videos_scored:,} scored videos")
    with progress.bar("writing the page"):
        said = page.written(workdir)
    print(f"\n{said}", flush=True)
    return summary


def print_table(results: Mapping[str, Heldout]) -> None:
    """Prints the mean rewards of policies, and what they gain over the first one."""
    rewards = {
        policy: {"reward": result.reward, **result.components} for policy, result in results.items()
    }
    count = len(next(iter(results.values())).reward)
    progress.table(_title(count), *statistics.heldout_table(rewards))


def print_finished(
    workdir: Path, summary: Mapping[str, Any], config: ml_collections.ConfigDict
) -> None:
    """Says that a run has nothing left to do, and prints the table that it ended with."""
    done = summary["iterations"]
    limit = "iterations" if done >= config.train.iterations else "budget_passes"
    print(f"{workdir}: finished; iteration {done} of {done} is done", flush=True)
    progress.table(_title(summary["heldout"]["num_prompts"]), *statistics.summary_table(summary))
    print(f"\nto go on, raise --config.train.{limit}", flush=True)


def _title(count: int) -> str:
    return f"held-out prompt sequences: {count}, with the same noise for every policy"


# ---------------------------------------------------------------- the command


def evaluate_run(
    workdir: Path, which: checkpoint.Which, arguments: Sequence[str], lora: str = ""
) -> None:
    """Prints the held-out table of one of a run's checkpoints, and of the LoRA files of --lora."""
    adapters = adapters_lib.parse(lora) if lora else []
    # The run is looked at and not continued, so any field may differ here.
    config = config_lib.override(workdir_lib.trained_config(workdir, which), arguments)
    config_lib.check(config)
    backbone_lib.check_files(config)
    command.use_compilation_cache()
    with progress.bar("preparing"):
        config = fitting.fitted(config)
        state = saved_state(workdir, config, run_lib.make_mesh(config), which)
        run = run_lib.load(config_lib.generating(config))
    policies = ("reference", "online", "ema")
    results = {}
    for policy in policies:
        with progress.bar(policy):
            results[policy] = evaluate(run, policy_of(state, policy))
    if adapters:
        with progress.bar("lora"):
            results["lora"] = evaluate(*with_adapters(run, adapters))
    print(f"iteration {int(state.iteration)} of {workdir}", flush=True)
    print_table(results)


def with_adapters(run: Run, adapters: Sequence[adapters_lib.Adapter]) -> tuple[Run, PyTree]:
    """The run with the rank and alpha of a sum of LoRA files, and that sum."""
    config = adapters_lib.configured(run.config, adapters)
    sized = dataclasses.replace(run, config=config, programs=programs_lib.build(config, run.mesh))
    return sized, sharding.place_weights(adapters_lib.load(adapters, wan_config(config)), run.mesh)


def evaluate_videos(given: flags.FlagValues) -> None:
    """Scores the video files that the flags name."""
    names = scorers.names_of(given.rewards)
    if not given.prompts:
        raise UsageError(
            "--videos needs --prompts, a file with one prompt sequence per video (docs/data.md)"
        )
    for name in scorers.LEARNED:
        if name in names and not given[name].value:
            source = backbone_lib.FILES[f"paths.{name}"]
            raise UsageError(f"--rewards={name} needs --{name}=FILE, {source}")
    if not names:
        raise UsageError(
            f"--rewards names nothing; there are {', '.join(scorers.LEARNED)}, motion, stream,"
            " flow, module:function, http://host:port"
        )
    for name, side in (("toy", toy_world.SIZE), ("return", return_world.SIZE)):
        if name in names:
            raise UsageError(
                f"--rewards={name} scores its own world's {side}x{side} pixels, which no video file"
                " has; try motion"
            )
    command.use_compilation_cache()
    paths = {name: str(given[name].value) for name in scorers.LEARNED}
    scorer = scorers.Scorers(given.rewards, paths)
    scorer.check()
    sequences = prompts.load(Path(given.prompts))
    output = Path(given.output or Path(given.videos) / "scores.csv")
    clips = given.clip_frames, given.clip_spacing
    blocks = _blocks_of(given.block_pixels)
    video_files.score(scorer, Path(given.videos), sequences, clips, output, blocks)


def _blocks_of(given: Sequence[str]) -> tuple[int, int] | None:
    """What --block_pixels says: pixel frames of the first block and of every other one."""
    if not given:
        return None
    if len(given) > 2 or not all(x.isdecimal() and int(x) for x in given):
        raise UsageError(
            f"--block_pixels={','.join(given)}: expected the pixel frames of the first block and of"
            " the others, as in 9,12 (Wan's blocks of 3 latent frames), or one number for all"
        )
    return int(given[0]), int(given[-1])


def export_vbench(given: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Writes what VBench needs to evaluate a policy; see `vbench.write`."""
    for name in ("prompts", "output"):
        if not given[name].value:
            raise UsageError(f"--export needs --{name}=..., see docs/evaluation.md")
    if Path(given.output).is_file():
        raise UsageError(f"--output={given.output} is a file; name a folder")
    if given.flickering and given.export != "vbench":
        raise UsageError("--flickering is for --export=vbench; the long one filters clips")
    prompt_file = Path(given.prompts)
    extended, flickering = (
        Path(name) if name else None for name in (given.extended, given.flickering)
    )
    originals, texts, filtered = vbench.read_prompts(
        given.export, prompt_file, extended, flickering
    )
    samples = given.samples or SAMPLES
    export = vbench.Export(given.export, originals, texts, samples, given.seed, filtered)
    generate = [f"--num_frames={given.num_frames}"] if given.num_frames else []
    if given.workdir:
        generate += [f"--checkpoint={given.workdir}", f"--iteration={given.iteration}"]
    if given.lora:
        generate.append(f"--lora={given.lora}")
    files = [path for path in (prompt_file, extended, flickering) if path is not None]
    vbench.write(export, Path(given.output), [*generate, *arguments], sys.argv[1:], files)


def evaluate_suite(given: flags.FlagValues, arguments: Sequence[str]) -> None:
    """The share of this process in an evaluation suite; see `suite.evaluate`."""
    share = sharding.share_of(os.environ, given.num_processes, given.process_id)
    if share.local is not None:  # a process per GPU, and each sees all of its machine
        jax.config.update("jax_cuda_visible_devices", str(share.local))
    if share.process:
        progress.mute()
    suite.evaluate(given, arguments, share)


# Flags that are for some of what the command does -> for what.
FLAGS_OF: dict[str, tuple[str, ...]] = {
    "config": ("workdir", "suite", "export"),
    "checkpoint": ("suite", "export"),
    "policy": ("suite",),
    "lora": ("workdir", "suite", "export"),
    "prompts": ("videos", "suite", "export"),
    "output": ("videos", "suite", "export", "import"),
    "rewards": ("videos",),
    **dict.fromkeys(scorers.LEARNED, ("videos",)),
    "clip_frames": ("videos",),
    "clip_spacing": ("videos",),
    "block_pixels": ("videos",),
    "extended": ("suite", "export"),
    "flickering": ("export",),
    "samples": ("suite", "export"),
    "seed": ("suite", "export"),
    "num_frames": ("suite", "export"),
    "against": ("suite",),
    "segment_clips": ("suite",),
    "num_processes": ("suite",),
    "process_id": ("suite",),
}


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    asked = [name for name in ("suite", "videos", "export", "import") if given[name].value]
    if given.workdir and asked != ["export"]:  # of an export it is the policy
        asked.append("workdir")
    if len(asked) != 1:
        raise UsageError("give one of --workdir, --suite, --videos, --export and --import")
    what = asked[0]
    for name, of in FLAGS_OF.items():
        if given[name].present and what not in of:
            needed = " or ".join(f"--{other}" for other in of)
            says = "; --workdir is scored as --config.FIELD=VALUE says" * (what == "workdir")
            raise UsageError(f"--{name} is for {needed}{says}")
    if given["iteration"].present and not (given.workdir or given.checkpoint):
        raise UsageError("--iteration names a checkpoint of --workdir; there is none here")
    if what in ("videos", "import") and arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}")
    if what == "suite":
        evaluate_suite(given, arguments[1:])
        return
    # These are for the suite; to a run and to kvpo-generate they are handed on.
    named = [name for name in ("config", "checkpoint") if given[name].value]
    handed = [f"--{name}={given[name].value}" for name in named]
    if what == "workdir":
        evaluate_run(Path(given.workdir), given.iteration, [*handed, *arguments[1:]], given.lora)
    elif what == "export":
        export_vbench(given, [*handed, *arguments[1:]])
    elif what == "import":
        folder = Path(str(given["import"].value))
        vbench.read(folder, Path(given.output or folder / "vbench.json"))
    else:
        evaluate_videos(given)


def define_flags() -> None:
    """The flags of the command."""
    command.define_path("workdir", None, "run directory")
    command.define_iteration()
    flags.DEFINE_string("lora", "", "also a converted LoRA, or a sum of several: A:1.0,B:0.5")
    flags.DEFINE_enum("suite", None, list(suite.SUITES), "generate and score a list of prompts")
    flags.DEFINE_string("config", None, "of a suite or an export, as of kvpo-generate")
    command.define_path("checkpoint", None, "of a suite: run directory, or converted base model")
    flags.DEFINE_enum("policy", None, list(POLICIES), "of a suite: of the run; default: online")
    command.define_path("against", None, "of a suite: the folder of another one, to compare with")
    flags.DEFINE_bool("segment_clips", False, "of a suite: also a video of every prompt segment")
    flags.DEFINE_integer("num_processes", None, "of a suite: processes that share the prompts")
    flags.DEFINE_integer("process_id", None, "of a suite: which of them this one is, from 0")
    command.define_path("videos", None, "folder of video files to score instead")
    command.define_path("prompts", None, "file of prompt sequences: of videos, suite or export")
    flags.DEFINE_enum("export", None, list(vbench.MODES), "write what VBench needs, to --output")
    command.define_path("import", None, "folder of VBench's results")
    command.define_path("extended", None, "of a suite or an export: what is generated, by line")
    command.define_path("flickering", None, "of an export: prompts with 25 videos to be filtered")
    flags.DEFINE_integer(
        "samples", None, "videos per prompt; by default 5, and 1 of --suite=long", 1
    )
    flags.DEFINE_integer(
        "seed", 0, "of the noise", lower_bound=0, upper_bound=config_lib.SEEDS - 1 - FILTERED
    )
    flags.DEFINE_integer("num_frames", 0, "latent frames; default: as the suite or prompts say")
    flags.DEFINE_string(
        "rewards",
        "motion",
        f"names, separated by commas: {', '.join(scorers.LEARNED)}, motion, stream, flow,"
        " module:function, http://host:port",
    )
    for name in scorers.LEARNED:
        command.define_path(name, "", f"converted weights of {name}")
    flags.DEFINE_integer("clip_frames", 36, "frames scored of each segment, centred; 0 = all")
    flags.DEFINE_integer("clip_spacing", 160, "a long segment has a clip every so many; 0 = one")
    flags.DEFINE_list(
        "block_pixels", [], "pixel frames of the first block and of the others, as in 9,12"
    )
    command.define_path(
        "output",
        None,
        "CSV file of --videos, JSON file of --import, by default beside them; folder of a suite or"
        " an export",
    )


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.evaluate", define_flags, main)


if __name__ == "__main__":
    cli()
