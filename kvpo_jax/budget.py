"""What a run spends, in passes and scored videos, from its configuration and its pivots alone.

A *pass* is one forward of one block of one trajectory through the network, whatever its context. A
block that is replayed with a gradient costs four: the forward, the forward that a backward repeats
(rematerialisation, whatever model.remat says, so that memory changes no count), and two for the
backward. Forward and backward passes add up to the budget.

Counted are rollout and replay as the programs run them: every pass of the solver and the one that
writes the cache, prompt switches as if every sentence changed, the anchor of every chunk of
branches, what measures tau's first unit. Not counted are held-out evaluation, blocks that are made
for a picture alone, places of a mesh that no trajectory fills, text, decoding and rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_collections

from kvpo_jax import backbone as backbone_lib
from kvpo_jax.algorithm import losses, replay
from kvpo_jax.errors import UsageError
from kvpo_jax.run import Run
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Windows

REMATERIALISED, BACKWARD = 1, 2  # further passes of a row with gradient


@dataclasses.dataclass(frozen=True)
class Spent:
    """What has been spent.

    Attributes:
      passes_forward: with those that are repeated for a gradient.
      passes_backward: 2 for every row with a gradient.
      videos_scored: those of the branches and of the anchor, each once.
    """

    passes_forward: int = 0
    passes_backward: int = 0
    videos_scored: int = 0

    @property
    def passes(self) -> int:
        """What train.budget_passes limits."""
        return self.passes_forward + self.passes_backward

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.passes_forward + other.passes_forward,
            self.passes_backward + other.passes_backward,
            self.videos_scored + other.videos_scored,
        )

    def __mul__(self, times: int) -> Spent:
        return Spent(*(times * value for value in dataclasses.astuple(self)))

    def metrics(self) -> dict[str, int]:
        """Name -> number, as metrics.jsonl and summary.json have them."""
        return dataclasses.asdict(self)


# ---------------------------------------------------------------- an iteration


def of_rollout(config: ml_collections.ConfigDict, pivot: int, blocks: int) -> Spent:
    """What the rollout of a prompt spends: `rollout.rollout` of its first blocks."""
    video, at_once = config.video, config_lib.branches_at_once(config)
    trajectories = config.rollout.branches // at_once * (at_once + 1)
    recache = config.window.recache_frames // video.block_frames
    switches = [frame // video.block_frames for frame in video.switch_frames]
    shared = recache * sum(switch <= pivot for switch in switches)
    own = recache * sum(pivot < switch < blocks for switch in switches)
    per_block = len(config.sampler.steps) + 1
    return Spent(pivot * per_block + shared + trajectories * ((blocks - pivot) * per_block + own))


def of_replay(config: ml_collections.ConfigDict, wanted: bool) -> Spent:
    """What a replay of a prompt spends: a policy's energies, and their gradient if it is wanted.

    A loss that is taken state by state has the old and the reference policy's velocities, where it
    reads them, in the same replay.
    """
    compares = config_lib.compares_energies(config)
    peers = losses.KINDS[config.objective.kind].peers
    extent = replay.Extent(
        branches=config.objective.anchors if peers else config.rollout.branches,
        blocks=config_lib.recorded_blocks(config),
        steps=len(config.sampler.steps),
        settled_from=config_lib.settled_from(config),
        own_starts=config_lib.own_starts(config),
    )
    if compares:
        learned, plain = replay.ROWS.get(config.replay.context, _every_row)(config.replay, extent)
    else:
        learned, _ = replay.own_rows(config.replay, extent)
        old, reference = config_lib.replays_old(config), config.objective.beta > 0
        plain = learned * (old + reference)
    again = learned if wanted else 0
    return Spent(plain + learned + REMATERIALISED * again, BACKWARD * again)


def _every_row(_: ml_collections.ConfigDict, extent: replay.Extent) -> replay.Rows:
    return replay.Rows(extent.branches * extent.blocks * extent.steps, 0)


def of_iteration(
    config: ml_collections.ConfigDict, to_pixel: Callable[[int], int], iteration: int, pivot: int
) -> Spent:
    """What an iteration, numbered from 0, spends with this pivot.

    Args:
      config: a checked one. What a continued run may change in it changes no count.
      to_pixel: the backbone's.
      iteration: the first one may measure tau's unit; on policy no old energies are replayed.
      pivot: the first perturbed block.
    """

    def explored(windows: Windows) -> Spent:
        return of_rollout(config, pivot, backbone_lib.blocks_read(config, to_pixel, windows, pivot))

    energies = of_replay(config, wanted=False)
    others = 1 if config_lib.is_on_policy(config, iteration) else 2  # reference, old
    others = others if config_lib.compares_energies(config) else 0
    spent = explored(backbone_lib.windows_read(config, to_pixel, pivot))
    spent += energies * others + of_replay(config, wanted=True) * config.train.epochs
    spent += Spent(videos_scored=config.rollout.branches + 1)
    if iteration == 0 and config_lib.has_energy_unit(config):
        spent += explored(()) + energies  # `train.calibrate`
    return spent * config.train.prompts_per_iteration


# ---------------------------------------------------------------- a run


def of_next(run: Run, iteration: int) -> Spent:
    """What an iteration of a run, numbered from 0, spends."""
    to_pixel = run.backbone.to_pixel
    return of_iteration(run.config, to_pixel, iteration, run.draw_pivot(iteration))


def of_first(run: Run, iterations: int) -> Spent:
    """What the first iterations of a run spend, the same whether it was interrupted or not."""
    return sum((of_next(run, iteration) for iteration in range(iterations)), Spent())


def limited(run: Run) -> Run:
    """The run with as many iterations as train.budget_passes allows; 0 allows all.

    Raises:
      UsageError: it allows none.
    """
    train, spent = run.config.train, Spent()
    if not train.budget_passes:
        return run
    for iteration in range(train.iterations):
        spent += of_next(run, iteration)
        if spent.passes > train.budget_passes:
            if not iteration:
                raise UsageError(
                    f"config.train.budget_passes={train.budget_passes}: the first iteration takes"
                    f" {spent.passes}; allow more, or 0 for no limit"
                )
            config = config_lib.with_fields(run.config, {"train.iterations": iteration})
            return dataclasses.replace(run, config=config)
    return run
