"""Names the trouble that a run is in, and what to try. docs/doctor.md explains every rule.

The rules are functions of the records of a run, the same for the training loop, for the command
`kvpo_jax.doctor` and for a report. What a run has not written down, no rule complains about.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvpo_jax.errors import shortened

PATIENCE = 10  # iterations that must agree before a habit is called one
FLAT = 40  # iterations without a better reward


class Finding(NamedTuple):
    """A trouble of a run.

    Attributes:
      name: of the rule.
      text: what is wrong, and what to try.
      since: the iteration that it began with, from 0, as in metrics.jsonl.
    """

    name: str
    text: str
    since: int


@dataclasses.dataclass(frozen=True)
class History:
    """What the rules read: see `examine`."""

    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    branches: Sequence[Mapping[str, Any]]
    heldout: Sequence[Mapping[str, Any]]

    def __getitem__(self, metric: str) -> np.ndarray:
        """A metric in every iteration, float64[n]; NaN where it is not known or not finite."""
        values = [row.get(metric) for row in self.rows]
        return np.array([math.nan if v is None else v for v in values], np.float64)

    def iteration(self, index: int) -> int:
        """The number of the iteration of a row."""
        return int(self.rows[index].get("iteration", index))

    def field(self, name: str, default: Any) -> Any:
        """A field of the configuration by its dotted name; a run of an older version lacks some."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if hasattr(value, "get") else None
        return value if isinstance(value, type(default)) else default

    def last_branches(self) -> list[Mapping[str, Any]]:
        """The records of the prompts of the newest iteration."""
        last = self.iteration(-1) if "iteration" in self.rows[-1] else None
        return [record for record in self.branches if record["iteration"] == last]


Told = tuple[str, int] | None  # what a rule says, and the iteration since when


def examine(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    branches: Sequence[Mapping[str, Any]] = (),
    heldout: Sequence[Mapping[str, Any]] = (),
) -> list[Finding]:
    """What is wrong with a run after its newest iteration; empty for a healthy run.

    Args:
      config: of the run.
      rows: the metrics of its iterations, the newest last.
      branches: records of its branches, of the newest iteration at least, as far as there are any.
      heldout: records of its evaluations, as far as there are any.
    """
    history = History(config, rows, branches, heldout)
    told = {name: rule(history) for name, rule in RULES.items()} if rows else {}
    return [Finding(name, *what) for name, what in told.items() if what is not None]


def _stretch(ill: np.ndarray, least: int = 1) -> int | None:
    """The index at which the stretch of True began that lasts until now.

    None if it is shorter than `least`.
    """
    well = np.flatnonzero(~ill)
    first = int(well[-1]) + 1 if len(well) else 0
    return first if len(ill) - first >= least else None


# ---------------------------------------------------------------- the group


def _identical(history: History) -> Told:
    first = _stretch(history["pixel_std_in_group"] == 0)
    if first is None:
        return None
    return (
        "the branches of every group are identical: routing changes nothing. Try more"
        " rollout.perturbed_steps or rollout.window_blocks, fewer window.near, or a longer"
        " window.cache_frames to draw from"
    ), history.iteration(first)


def _no_spread(history: History) -> Told:
    first = _stretch((history["reward_std_in_group"] == 0) & (history["pixel_std_in_group"] != 0))
    if first is None:
        return None
    return (
        "the branches differ but their rewards do not, or by their rounding alone: nothing to"
        " learn from. Is the reward saturated?"
    ), history.iteration(first)


def _one_prompt(history: History) -> Told:
    prompts, share = history["prompts_with_weight"], history["prompt_weight_max"]
    with np.errstate(divide="ignore"):
        first = _stretch((prompts > 2) & (share > np.maximum(0.5, 2 / prompts)))
    if first is None:
        return None
    weighed = [record for record in history.last_branches() if record.get("weight") is not None]
    heaviest = max(weighed, key=lambda record: record["weight"], default={"prompt": ()})
    which = shortened([repr(sentence) for sentence in heaviest["prompt"]], 1)
    return (
        f"one of {prompts[-1]:.0f} prompts{which and f', {which},'} has {share[-1]:.0%} of the"
        " weight in the gradient. "
        + (
            "Its energies are the least distinguishable: try objective.tau_unit=running_std"
            if history.field("objective.tau_unit", "") == "group_std"
            else "Try more train.prompts_per_iteration, or objective.advantage_clip"
        )
    ), history.iteration(first)


# ---------------------------------------------------------------- the update


def _gate(history: History) -> Told:
    first = _stretch(history["gate_open"] == 0, PATIENCE)
    if first is None:
        return None
    learned = "little" if history.field("objective.gate", "") == "mechanism_2" else "nothing"
    return (
        f"no branch has beaten its anchor in {len(history.rows) - first} iterations, so {learned}"
        " is learned. Try fewer rollout.perturbed_steps or rollout.window_blocks (milder routing),"
        " or more rollout.branches"
    ), history.iteration(first)


def _entropy(history: History) -> Told:
    most = math.log(max(history.field("rollout.branches", 1), 1))
    first = _stretch(history["entropy"] < 0.1 * most, PATIENCE)
    if first is None:
        return None
    return (
        "the policy of a group has collapsed onto one branch for"
        f" {len(history.rows) - first} iterations. Raise objective.tau, or objective.beta"
    ), history.iteration(first)


def _clip(history: History) -> Told:
    first = _stretch(history["clip_fraction"] > 0.9, PATIENCE)
    if first is None:
        return None
    return (
        f"nearly every ratio has been clipped for {len(history.rows) - first} iterations. Lower"
        " train.learning_rate, train.epochs or train.rollouts_per_sync, or raise objective.tau"
    ), history.iteration(first)


def _flat(history: History) -> Told:
    anchor = history["reward_anchor"]
    if len(anchor) < 2 * FLAT:
        return None
    both = np.lib.stride_tricks.sliding_window_view(anchor, 2 * FLAT)
    before, after = both[:, :FLAT].mean(1), both[:, FLAT:].mean(1)
    first = _stretch(after - before < 0.1 * both.std(1))
    if first is None:
        return None
    return (
        f"the reward of the anchors has not risen in {FLAT} iterations"
        f" ({before[-1]:+.4f} then {after[-1]:+.4f}). Compare a run with"
        " objective.shuffle_advantages; try a larger train.learning_rate, a smaller"
        " objective.beta, more prompts per iteration"
    ), history.iteration(first + FLAT)


# name -> what it says of a run so far, if it is in this trouble
RULES: dict[str, Callable[[History], Told]] = {
    "identical branches": _identical,
    "no spread": _no_spread,
    "one prompt": _one_prompt,
    "gate": _gate,
    "entropy": _entropy,
    "clip": _clip,
    "flat": _flat,
}


# ---------------------------------------------------------------- in the training loop


class Doctor:
    """Says each trouble once when it begins, and once when it is over."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._rows: list[Mapping[str, Any]] = []
        self._heldout: list[Mapping[str, Any]] = []
        self._known: set[str] = set()

    def visit(
        self,
        metrics: Mapping[str, Any],
        branches: Sequence[Mapping[str, Any]] = (),
        heldout: Sequence[Mapping[str, Any]] = (),
    ) -> list[str]:
        """The new lines to print after an iteration.

        Args:
          metrics: of the iteration.
          branches: its records of branches.
          heldout: the record of its evaluation, if there was one.
        """
        self._rows.append(metrics)
        self._heldout.extend(heldout)
        now = examine(self._config, self._rows, branches, self._heldout)
        lines = [f"  doctor: {found.text}" for found in now if found.name not in self._known]
        names = {found.name for found in now}
        lines += [f"  doctor: over: {name}" for name in RULES if name in self._known - names]
        self._known = names
        return lines
