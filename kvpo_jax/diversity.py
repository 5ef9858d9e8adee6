"""Diversity sampling: how far apart the branches of one fork are (paper, Fig. 1 and 7).

`generate --branches=K` writes the anchor and K branches of each prompt sequence, made by the
rollout of training, and how much they differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from kvpo_jax import backbone as backbone_lib
from kvpo_jax.algorithm import explore, keys, routing
from kvpo_jax.errors import DivergedError, UsageError
from kvpo_jax.rewards import scorers
from kvpo_jax.rollout import rollout
from kvpo_jax.run import Run
from kvpo_jax.runtime import films, media, metrics, page, progress, statistics
from kvpo_jax.types import Array, PyTree, Rollout, Scores

# Beside the videos:
RECORDS = "branches.jsonl"  # a JSON object per prompt sequence
PAGE = "branches.html"


class Sampled(NamedTuple):
    """What came of one fork.

    Attributes:
      sentences: the prompt sequence.
      rolled: the anchor and the branches, of one prompt.
      pixels: [frames, h, w, 3] from the fork on, of the anchor and then of each branch; uint8 or
        float in [0, 1].
      scores: of the one prompt; None if the rewards cannot be had for nothing (`scored`).
    """

    sentences: Sequence[str]
    rolled: Rollout
    pixels: Sequence[np.ndarray]
    scores: Scores | None


# ---------------------------------------------------------------- what is asked for


# What --explore says -> the fields of config.rollout. Branches with noise share none of it.
EXPLORE: Mapping[str, Mapping[str, Any]] = {
    "routing": {"explore": "routing"},
    "noise": {"explore": "init_noise", "noise_mix": "preserving", "noise_scale": 1.0},
}


def config_of(
    config: ml_collections.ConfigDict, branches: int, frames: int, explored: str | None = None
) -> ml_collections.ConfigDict:
    """The configuration of a rollout of so many branches and latent frames.

    Args:
      config: of the run.
      branches: K.
      frames: of the video.
      explored: a key of EXPLORE; None is what the run explores.
    """
    out = config.copy_and_resolve_references().unlock()
    out.rollout.update({} if explored is None else EXPLORE[explored])
    out.video.blocks = frames // config.video.block_frames
    out.rollout.branches = branches
    out.rollout.branch_chunk = math.gcd(branches, config.rollout.branch_chunk)
    out.replay.blocks = 0  # nothing is replayed
    return out.lock()


def switching(
    config: ml_collections.ConfigDict, switch_frames: Sequence[int]
) -> ml_collections.ConfigDict:
    """The configuration with other prompt switches, which no program depends on."""
    out = config.copy_and_resolve_references().unlock()
    out.video.switch_frames = tuple(switch_frames)
    return out.lock()


def check_pivot(config: ml_collections.ConfigDict, pivot: int | None) -> int:
    """The block at which the branches part: `pivot`, or by default the first that can be it.

    Args:
      config: from `config_of` and `switching`.
      pivot: what is asked for.

    Raises:
      UsageError: it cannot be; the message says why, and which blocks can.
    """
    window, video = routing.window(config.window), config.video
    branches, length = config.rollout.branches, config.rollout.window_blocks
    possible = list(range(video.blocks - length + 1))
    if explore.EXPLORES[config.rollout.explore].routes:
        possible = routing.eligible_pivots(
            window, video.blocks, video.block_frames, video.switch_frames, branches, length, length
        )
    if pivot is None and possible:
        return possible[0]
    if pivot in possible:
        return pivot
    if not possible:
        raise UsageError(
            f"--branches={branches}: no block of {video.blocks} can be the pivot, with"
            f" config.rollout.window_blocks={length}, prompt switches at frames"
            f" {tuple(video.switch_frames)} and {window}; raise --num_frames, or ask for fewer"
        )
    assert pivot is not None
    fork, end = pivot * video.block_frames, (pivot + length) * video.block_frames
    pool = int(routing.routable(window, max(fork, 1), fork, end - video.block_frames).sum())
    if not 0 <= pivot <= video.blocks - length:
        why = f"the {length} perturbed blocks must lie in blocks 0 to {video.blocks - 1}"
    elif fork < window.slots:
        why = f"it has {fork} past frames, and a context holds {window.slots}"
    elif math.comb(pool, window.routed) <= branches:
        why = f"{window.routed} of {pool} past frames can be drawn in too few ways"
    else:
        why = "a prompt switches inside the perturbed blocks"
    raise UsageError(f"--pivot={pivot}: {why}; possible are {_ranges(possible)}")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: "5 to 9, 12"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


# ---------------------------------------------------------------- the branches


def sample(
    run: Run, variables: PyTree, sentences: Sequence[str], seed: int, index: int, pivot: int
) -> Rollout:
    """The anchor and the branches of one prompt sequence, as training makes them.

    The noise is that of the video which `generate` makes without branches.

    Args:
      run: of `config_of`, with the switches of these sentences.
      variables: of the generating policy.
      sentences: the prompt sequence.
      seed: of noise and draws.
      index: the number of the prompt sequence.
      pivot: the first perturbed block.

    Raises:
      DivergedError: the videos are not finite.
    """
    config, number = run.config, np.zeros(1, np.int32)
    batch = backbone_lib.batch_of(run.backbone, run.mesh, [tuple(sentences)], number)
    noise = keys.NoiseKey(keys.draw_key(seed, "heldout", index), number)
    fork_frame = pivot * config.video.block_frames
    routed_frames = run.programs.draw(keys.draw_key(seed, "routing", index), number, fork_frame)
    with progress.bar("anchor and branches"):
        rolled = rollout(run, variables, batch, noise, routed_frames, pivot)
    if not run.programs.all_finite((rolled.branches, rolled.anchor)):
        raise DivergedError("the videos are not finite: the weights are at fault, or the LoRA")
    return rolled


def file_names(name: str, branches: int) -> dict[str, str]:
    """The files of anchor and branches, by what `videos` calls them; `name` is a video's alone."""
    parts = films.branch_names(branches)
    return {part: f"{name.removesuffix('.mp4')}_{part}.mp4" for part in parts}


def videos(rolled: Rollout) -> Iterator[tuple[str, Array]]:
    """Name and latents float[1, frames, Y, X, C] of the anchor and then of each branch."""
    anchor, *branches = films.branch_names(rolled.branches.shape[1])
    yield anchor, rolled.anchor
    for number, name in enumerate(branches):
        yield name, rolled.branches[:, number]


def blocks_of(config: ml_collections.ConfigDict, latents: Array) -> Iterator[Array]:
    """The blocks float[1, F, Y, X, C] of a video."""
    frames = config.video.block_frames
    for first in range(0, latents.shape[1], frames):
        yield latents[:, first : first + frames]


def scored(run: Run, sentences: Sequence[str], rolled: Rollout, pivot: int) -> Scores | None:
    """The rewards of the configuration, where all of them come with the package and need no file.

    No module of somebody's own is imported, and no weights are loaded, to generate videos.
    """
    config, to_pixel = run.config, run.backbone.to_pixel
    names = scorers.names_of(config.reward.scorer)
    if not names or not set(names) <= set(scorers.WITHOUT_FILES):
        return None
    windows = backbone_lib.windows_read(config, to_pixel, pivot)
    pixels = run.decoder.group(rolled.branches, rolled.anchor, pivot, windows)
    scores, _ = backbone_lib.score_group(config, run.backbone, [sentences], pixels, pivot)
    return scores


# ---------------------------------------------------------------- what is said of them


def distances(config: ml_collections.ConfigDict, sampled: Sampled, pivot: int) -> dict[str, Any]:
    """How far apart the videos are from the fork on, see `statistics.pairwise`.

    Returns:
      "pixels" and "latents" -> RMS differences; row and column 0 are the anchor's.
    """
    fork = pivot * config.video.block_frames
    latents = [np.asarray(x[0, fork:]) for _, x in videos(sampled.rolled)]
    return {
        name: statistics.pairwise(arrays)
        for name, arrays in (("pixels", sampled.pixels), ("latents", latents))
    }


def record(
    config: ml_collections.ConfigDict,
    sampled: Sampled,
    pivot: int,
    names: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """What RECORDS has of a prompt sequence: as a run's branches.jsonl, as far as it goes.

    Args:
      config: of the rollout.
      sampled: what came of the fork.
      pivot: the first perturbed block.
      names: "anchor", "branch_0", ... -> the file of its video.
      seed: of noise and draws.
    """
    return {
        "prompt": list(sampled.sentences),
        **metrics.place_of(config, pivot),
        "explore": config.rollout.explore,
        "routed": np.asarray(sampled.rolled.routed_frames[0]).tolist(),
        **({} if sampled.scores is None else metrics.score_records(sampled.scores)[0]),
        "seed": seed,
        "videos": dict(names),
        "distance": distances(config, sampled, pivot),
    }


def print_tables(row: Mapping[str, Any]) -> None:
    """Prints the distances of a record, and its rewards if there are any."""
    branches = len(row["routed"])
    names = ["anchor", *map(str, range(branches))]
    rewards = [row["reward_anchor"], *row["reward"]] if "reward" in row else None
    for what, found in row["distance"].items():
        columns = ["branch", *names]
        rows = [
            [name, *(f"{x:.4f}" for x in line)]
            for name, line in zip(names, found["matrix"], strict=True)
        ]
        where = f"{what} from latent frame {row['fork_frame']} on"
        progress.table(f"RMS difference in {where} ({row['explore']})", columns, rows)
        mean = "" if found["mean"] is None else f"mean of the pairs {found['mean']:.4f}, "
        progress.say(f"{mean}to the anchor {found['to_anchor']:.4f}\n")
    if rewards:
        progress.table("", ["branch", *names], [["reward", *(f"{x:.4f}" for x in rewards)]])


def write_page(
    rows: Sequence[Mapping[str, Any]], configs: Sequence[ml_collections.ConfigDict], output: Path
) -> None:
    """Writes PAGE: the gallery of each record, as a run's report has it.

    Args:
      rows: the records.
      configs: of their rollouts.
      output: the folder of the videos.
    """
    paths = [{name: output / file for name, file in row["videos"].items()} for row in rows]
    files = {i: list(of_row.values()) for i, of_row in enumerate(paths)}
    contents = media.fitting(files, page.ROOM)
    groups = [
        page.gallery(
            _mapped(config),
            row,
            paths[i],
            dict(zip(paths[i], contents[i], strict=True)) if i in contents else {},
        )
        for i, (row, config) in enumerate(zip(rows, configs, strict=True))
    ]
    page.write_branches(f"Branches of a fork: {rows[0]['explore']}", groups, output / PAGE)


def _mapped(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What a gallery reads; without the window it draws no map of routed frames."""
    if explore.EXPLORES[config.rollout.explore].routes:
        return config
    out = config.copy_and_resolve_references().unlock()
    del out.window
    return out
