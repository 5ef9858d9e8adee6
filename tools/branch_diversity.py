"""Shows what routing changes and what noise changes, in a generator of the world "return".

    python tools/branch_diversity.py [--groups=48] [--json=FILE] [--picture=FILE]
    python tools/branch_diversity.py --config=configs/return.py:weak [--config.FIELD=VALUE ...]

Nothing is trained. It prints three tables about the reference policy:

* what returns under the deployment window, on the held-out stories, task by task;
* how often the first object returns, by how many of the routed frames show it, and what the rule of
  the data says (`return_world.vote_probabilities`);
* how the branches of a group differ, by what they explore (config.rollout.explore, with fresh noise
  where it is noise): the spread of the reward and of its semantic (SC) and appearance (VQ) parts,
  and how much of the variance of the pixels lies between the objects that return and not within
  one of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
import trials
from absl import flags

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import rollout as rollout_lib
from kvpo_jax import run as run_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.data import return_world
from kvpo_jax.errors import UsageError
from kvpo_jax.rewards import returning
from kvpo_jax.rewards.composite import Sentence, composite
from kvpo_jax.run import Run
from kvpo_jax.runtime import command, pictures
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.atomic import replacing, write_json
from kvpo_jax.runtime.statistics import mean_interval, show_interval
from kvpo_jax.types import PromptBatch, PyTree

SEED = 100  # of stories and noise; no run of the docs has it
WAYS = ("routing", "init_noise", "transition", "routing+init_noise")  # in explore.EXPLORES
CLEAR = 0.5  # probability from which a block shows an object


class Groups(NamedTuple):
    """Branches and anchors of P stories.

    Attributes:
      stories: their sentences.
      branches: float[P, G, frames, Y, X, C], latents.
      anchor: float[P, frames, Y, X, C].
      routed: int32[P, G, routed], the frames that were drawn for each branch.
    """

    stories: tuple[tuple[str, ...], ...]
    branches: np.ndarray
    anchor: np.ndarray
    routed: np.ndarray


def joined(some: Sequence[Groups]) -> Groups:
    """The groups of several batches."""
    stories, *arrays = zip(*some, strict=True)
    return Groups(sum(stories, ()), *map(np.concatenate, arrays))


# ---------------------------------------------------------------- branches


def batch_of(run: Run, stories: Sequence[list[str]]) -> PromptBatch:
    """Stories as the rollout takes them."""
    told = dataclasses.replace(run.backbone, prompts=lambda split, index: stories[index])
    return backbone_lib.prompt_batch(told, run.mesh, "train", 0, np.arange(len(stories)))


def stories_of(task: str, count: int, start: int, seed: int = SEED) -> list[list[str]]:
    """The stories start, start + 1, ... of a task, of pairs that a run trains on."""
    found, index = [], 0
    while len(found) < start + count:
        story = return_world.sample_prompts((seed, index), "train", return_world.SEGMENTS)
        found += [story] * (return_world.task_of(story) == task)
        index += 1
    return found[start:]


def groups_of(
    run: Run, variables: PyTree, batch: PromptBatch, number: int, seed: int = SEED
) -> Groups:
    """Groups whose branches differ in what config.rollout.explore says."""
    fork = run.pivots[0] * run.config.video.block_frames
    noise = keys.NoiseKey(keys.draw_key(seed, "noise", number), batch.numbers)
    drawn = run.programs.draw(keys.draw_key(seed, "routing", number), batch.numbers, fork)
    rolled = rollout_lib.rollout(run, variables, batch, noise, drawn, run.pivots[0])
    return Groups(batch.sentences, *map(np.asarray, (rolled.branches, rolled.anchor, drawn)))


# ---------------------------------------------------------------- what they show


def returned(run: Run, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pixels [..., frames, h, w, 3] of what returns, and the object of its first block.

    The object is int[...], -1 where none is clear.
    """
    start, f = run.config.video.switch_frames[-1], run.config.video.block_frames
    pixels = np.asarray(return_world.decode(jnp.asarray(latents[..., start:, :, :, :])))
    first = np.asarray(returning.recognise(pixels[..., :f, :, :, :])[0]).mean(axis=-2)
    return pixels, np.where(first.max(axis=-1) >= CLEAR, first.argmax(axis=-1), -1)


def scores(run: Run, stories: Sequence[Sequence[str]], pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The reward "R" and its components, float[P, T], of what returns.

    `pixels` are those of `returned`, float[P, T, frames, h, w, 3].
    """
    p, t = pixels.shape[:2]
    prompts = [Sentence.of(story, len(story) - 1) for story in stories for _ in range(t)]
    found = returning.score(pixels.reshape(p * t, *pixels.shape[2:]), prompts)
    parts = {name: np.asarray(x).reshape(p, t) for name, x in found.items()}
    return {"R": np.asarray(composite(parts, run.config.reward.weights)), **parts}


def between_share(pixels: np.ndarray, objects: np.ndarray) -> tuple[float, float]:
    """The variance of pixels float[P, G, ...] in a group, and its share between objects int[P, G].

    What is left of it lies within the branches that show the same object. Branches that show no
    clear one (-1) count as showing the same.
    """
    total, within = [], []
    for group, shown in zip(pixels, objects, strict=True):
        total.append(group.var(axis=0).mean())
        means = {o: group[shown == o].mean(axis=0) for o in set(shown.tolist())}
        own = np.stack([means[o] for o in shown.tolist()])
        within.append(np.square(group - own).mean())
    variance = float(np.mean(total))
    return variance, (variance - float(np.mean(within))) / max(variance, 1e-9)


def spread(run: Run, groups: Groups) -> dict[str, Any]:
    """How the branches of groups differ: a row of the third table."""
    pixels, objects = returned(run, groups.branches)
    anchors, _ = returned(run, groups.anchor[:, None])
    found = scores(run, groups.stories, pixels)
    anchor = scores(run, groups.stories, anchors)["R"]
    weights = run.config.reward.weights
    parts = {name: float((w * found[name]).var(axis=1).mean()) for name, w in weights.items()}
    deviation, interval = mean_interval(found["R"].std(axis=1))
    f = run.config.video.block_frames
    variance, between = between_share(pixels[:, :, :f], objects)
    firsts = np.array([return_world.parse(story[0]) for story in groups.stories])
    return {
        "reward std": deviation,
        "reward std ci95": interval,
        "SC std": float(found["SC"].std(axis=1).mean()),
        "VQ std": float(found["VQ"].std(axis=1).mean()),
        "semantic share of var R": parts["SC"] / max(sum(parts.values()), 1e-12),
        "pixel var": variance,
        "between objects": between,
        "objects in a group": float(np.mean([len(set(row.tolist())) for row in objects])),
        "wanted": float(np.mean(objects == firsts[:, None])),
        "best - anchor": float((found["R"].max(axis=1) - anchor[:, 0]).mean()),
    }


# ---------------------------------------------------------------- the tables


def deployment(run: Run, variables: PyTree, seed: int = SEED) -> list[dict[str, Any]]:
    """What returns in the held-out stories, a row for each task and ending."""
    count = run.config.eval.prompts
    noise = keys.NoiseKey(keys.draw_key(seed, "heldout", 0), np.arange(count))
    told, rows = [run.backbone.prompts("heldout", i) for i in range(count)], []
    for ending in (return_world.RETURNS, return_world.FIRST_RETURNS):
        stories = [[*story[:-1], ending] for story in told]
        batch = batch_of(run, stories)
        latents = rollout_lib.generate(run, variables, batch, noise, run.config.video.blocks)
        pixels, _ = returned(run, np.concatenate(latents, axis=1)[:, None])
        found, tasks = scores(run, stories, pixels), [*map(return_world.task_of, stories)]
        for task in return_world.TASKS:
            here = np.array(tasks) == task
            means = {name: float(x[here].mean()) for name, x in found.items()}
            rows.append({"task": task, "ending": ending, **means})
    return rows


def votes(run: Run, groups: Groups, exponent: float) -> list[dict[str, float]]:
    """By how many routed frames show the first object of an "outvoted" story: a row each.

    The deployment window has none of them, so that the anchors are the row of 0.
    """
    f, sink = run.config.video.block_frames, run.config.window.sink
    firsts = np.array([return_world.parse(story[0]) for story in groups.stories])
    branches, anchors = returned(run, groups.branches)[1], returned(run, groups.anchor)[1]
    # The blocks of the first object are the sink and the block after it.
    shows = np.append((groups.routed < 2 * f).sum(axis=2), 0 * firsts)
    hit = np.append(branches == firsts[:, None], anchors == firsts)
    rows = []
    for count in sorted(set(shows.tolist())):
        rule = return_world.vote_probabilities(
            jnp.array([sink + count, groups.routed.shape[2] - count]), exponent
        )
        here = hit[shows == count]
        rows.append(
            {"frames": count, "n": len(here), "share": float(here.mean()), "rule": float(rule[0])}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of rows with the same columns."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return show_interval(value)
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return trials.markdown([{name: cell(x) for name, x in row.items()} for row in rows])


def picture(run: Run, groups: dict[str, Groups], path: Path) -> None:
    """The branches of the first story, as strips of every frame."""
    frames = np.arange(run.config.video.blocks * run.config.video.block_frames)
    # All ways have the anchor in common.
    rows = [("anchor", next(iter(groups.values())).anchor[0])]
    for name, some in groups.items():
        rows += [
            (f"{name}, branch {number}", video) for number, video in enumerate(some.branches[0])
        ]
    shown = [(name, np.asarray(return_world.decode(jnp.asarray(video)))) for name, video in rows]
    sheet = pictures.sheet(shown, frames)
    with replacing(path) as temporary:
        sheet.quantize(256).save(temporary, format="PNG")


def loaded(config: ml_collections.ConfigDict, ways: Sequence[str]) -> dict[str, Run]:
    """The generator of `config` with what its branches explore, values of rollout.explore."""
    runs = {}
    for way in ways:
        with (own := config.copy_and_resolve_references()).unlocked():
            own.rollout.update(explore=way, noise_scale=1.0)
        runs[way] = run_lib.load(own)
    return runs


def measure(
    runs: dict[str, Run], groups: int, path: Path | None = None, seed: int = SEED
) -> dict[str, Any]:
    """The three tables.

    Args:
      runs: from `loaded`, the first of "routing".
      groups: how many of each task.
      path: where to write a picture of a group, or None.
      seed: of stories, noise and routing.
    """
    ways, first = list(runs), next(iter(runs.values()))
    config = first.config
    variables, at_once = first.variables(first.initial_lora()), config.train.prompts_per_iteration
    measured: dict[str, Any] = {"deployment": deployment(first, variables, seed), "diversity": []}
    for task in return_world.TASKS:
        told = [
            stories_of(task, at_once, number * at_once, seed)
            for number in range(math.ceil(groups / at_once))
        ]
        made = {
            way: joined(
                [
                    groups_of(run, variables, batch_of(run, stories), number, seed)
                    for number, stories in enumerate(told)
                ]
            )
            for way, run in runs.items()
        }
        if task == "outvoted":
            exponent = return_world.EXPONENTS[config.backbone]
            measured["votes"] = votes(first, made[ways[0]], exponent)
            if path is not None:
                picture(first, {way: made[way] for way in ways[:2]}, path)
        for way, some in made.items():
            row = {"task": task, "explore": way, **spread(first, some)}
            measured["diversity"].append(row)
    return measured


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    config = config_lib.override(config_lib.load(given.config), arguments[1:])
    config_lib.check(config)
    if config.backbone not in return_world.EXPONENTS:
        raise UsageError(
            f'--config={given.config}: backbone {config.backbone!r} is not of the world "return";'
            f" there are {', '.join(return_world.EXPONENTS)}"
        )
    file, path = (
        command.writable(name, given[name].value) if given[name].value else None
        for name in ("json", "picture")
    )
    command.use_compilation_cache()
    measured = measure(loaded(config, WAYS), given.groups, path)
    print("\nUnder the deployment window, held out:\n")
    print(table(measured["deployment"]))
    print("\nThe first object returns, by routed frames that show it (outvoted):\n")
    print(table(measured["votes"]))
    print(f"\nBranches of {given.groups} groups:\n")
    print(table(measured["diversity"]))
    if file:
        write_json(measured, file)


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string("config", "configs/return.py", "configuration of a generator")
    flags.DEFINE_integer("groups", 48, "stories of each task, rounded up", lower_bound=2)
    command.define_path("json", None, "file to write the tables to")
    command.define_path("picture", None, "PNG to write the branches of a story to")


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
