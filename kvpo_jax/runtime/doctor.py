"""Names the trouble that a run is in, and what to try. It reads the metrics and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

PATIENCE = 10  # iterations that must agree before a habit is called one
FLAT = 40  # iterations without a better reward


def diagnose(
    config: ml_collections.ConfigDict, rows: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    """What is wrong now, name -> sentence; empty for a healthy run.

    Args:
      config: of the run.
      rows: the metrics of the last iterations, the newest last.
    """
    found, row = {}, rows[-1]
    branches = config.rollout.branches

    def lately(name):
        return np.array([r[name] for r in rows[-PATIENCE:]], np.float64)

    settled = len(rows) >= PATIENCE

    if row["pixel_std_in_group"] == 0:
        found["identical branches"] = (
            "the branches of every group are identical: routing changes nothing. Try more"
            " rollout.perturbed_steps or rollout.window_blocks, fewer window.near, or a longer"
            " window.cache_frames to draw from"
        )
    elif row["reward_std_in_group"] == 0:
        found["no spread"] = (
            "the branches differ but their rewards do not, or by their rounding alone: nothing to"
            " learn from. Is the reward saturated?"
        )
    prompts, share = row["prompts_with_weight"], row["prompt_weight_max"]
    if prompts > 2 and share > max(0.5, 2 / prompts):
        found["one prompt"] = (
            f"one of {prompts:.0f} prompts has {share:.0%} of the weight in the gradient. "
            + (
                "Its energies are the least distinguishable: try objective.tau_unit=running_std"
                if config.objective.tau_unit == "group_std"
                else "Try more train.prompts_per_iteration, or objective.advantage_clip"
            )
        )
    if settled and np.all(lately("gate_open") == 0):
        found["gate"] = (
            f"no branch has beaten its anchor in {PATIENCE} iterations, so"
            f" {'little' if config.objective.gate == 'mechanism_2' else 'nothing'} is learned. Try"
            " fewer rollout.perturbed_steps or rollout.window_blocks (milder routing), or more"
            " rollout.branches"
        )
    if settled and np.all(lately("entropy") < 0.1 * math.log(branches)):
        found["entropy"] = (
            f"the policy of a group has collapsed onto one branch for {PATIENCE} iterations. Raise"
            " objective.tau, or objective.beta"
        )
    if settled and np.all(lately("clip_fraction") > 0.9):
        found["clip"] = (
            f"nearly every ratio has been clipped for {PATIENCE} iterations. Lower"
            " train.learning_rate, train.epochs or train.rollouts_per_sync, or raise objective.tau"
        )
    if len(rows) >= 2 * FLAT:
        anchor = np.array([r["reward_anchor"] for r in rows], np.float64)
        before, after = anchor[-2 * FLAT : -FLAT], anchor[-FLAT:]
        if after.mean() - before.mean() < 0.1 * np.std(anchor[-2 * FLAT :]):
            found["flat"] = (
                f"the reward of the anchors has not risen in {FLAT} iterations"
                f" ({before.mean():+.4f} then {after.mean():+.4f}). Compare a run with"
                " objective.shuffle_advantages; try a larger train.learning_rate, a smaller"
                " objective.beta, more prompts per iteration"
            )
    return found


class Doctor:
    """Says each trouble once when it begins, and once when it is over."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config
        self._rows: list[Mapping[str, float]] = []
        self._known: dict[str, str] = {}

    def visit(self, metrics: Mapping[str, float]) -> list[str]:
        """The new lines to print after an iteration with these metrics."""
        self._rows = [*self._rows, metrics][-2 * max(FLAT, PATIENCE) :]
        now = diagnose(self._config, self._rows)
        lines = [f"  doctor: {text}" for name, text in now.items() if name not in self._known]
        lines += [f"  doctor: over: {name}" for name in self._known if name not in now]
        self._known = now
        return lines
