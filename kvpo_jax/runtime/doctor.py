"""Names the trouble that a run is in, and what to try. docs/doctor.md explains every rule.

The rules are functions of the records of a run, the same for the training loop, for the command
`kvpo_jax.doctor` and for a report. Of what a run has not written down, no rule complains.
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
ERRORS = 2.0  # standard errors by which a held-out mean must change to count
TREND_ERRORS = 3.0  # the same of a training reward, which is looked at after every iteration
PROMPTS = 8  # held-out prompts that a standard error takes
EARLY = 0.1  # of the gain of later blocks: what an early block may lose
FALL = 0.05  # of its level: what a watched score may lose
# May fall: livelier videos lower the first; the others are shares of frames without what is wanted.
MAY_FALL = ("temporal_flickering", "shown", "other")
DRIFT = {"exposure": 0.1, "saturation": 0.1, "clipped": 0.05}  # by how much videos may change


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
        return _floats([row.get(metric) for row in self.rows])

    def iterations(self) -> np.ndarray:
        """The numbers of the iterations, int[n]."""
        return np.array([row.get("iteration", i) for i, row in enumerate(self.rows)], int)

    def field(self, name: str, default: Any) -> Any:
        """A field of the configuration by its dotted name; a run of an older version lacks some."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if hasattr(value, "get") else None
        kinds = (int, float) if isinstance(default, float) else type(default)
        return value if isinstance(value, kinds) else default

    def records(self) -> dict[int, list[Mapping[str, Any]]]:
        """iteration -> the records of its prompts."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        for record in self.branches:
            found.setdefault(record["iteration"], []).append(record)
        return found

    def evaluated(self, metric: str) -> np.ndarray:
        """A metric of the newest evaluation in every iteration, float64[n]."""
        values = self[metric]
        newest = np.maximum.accumulate(np.where(np.isnan(values), -1, np.arange(len(values))))
        return np.where(newest < 0, math.nan, values[newest])

    def by_evaluation(self, values: Sequence[float]) -> np.ndarray:
        """A value per record of an evaluation: that of the newest in every iteration, float64[n].

        An evaluation counts the iterations that are done, iterations are numbered from 0.
        """
        done = np.array([record["iteration"] for record in self.heldout], int)
        newest = np.searchsorted(done, self.iterations() + 1, side="right")
        return _floats([math.nan, *values])[newest]


class Rule(NamedTuple):
    """A trouble.

    Attributes:
      ill: whether each iteration is in it, bool[n].
      tell: what is wrong, and what to try; of a run whose last iterations, from this index on, are
        in trouble.
      least: iterations that must be, one after the other, before it is said.
    """

    ill: Callable[[History], np.ndarray]
    tell: Callable[[History, int], str]
    least: int = 1


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
    found, numbers = [], history.iterations()
    for name, stretches in _troubles(history).items():
        first, end = stretches[-1]
        if end == len(rows):
            found.append(Finding(name, RULES[name].tell(history, first), int(numbers[first])))
    return found


def over(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    branches: Sequence[Mapping[str, Any]] = (),
    heldout: Sequence[Mapping[str, Any]] = (),
) -> dict[str, list[tuple[int, int]]]:
    """The troubles that a run was in and is not any more: name -> first and last iteration of each.

    Arguments as those of `examine`.
    """
    history = History(config, rows, branches, heldout)
    numbers = history.iterations()
    return {
        name: [(int(numbers[first]), int(numbers[end - 1])) for first, end in stretches]
        for name, stretches in _troubles(history).items()
        if stretches[-1][1] < len(rows)
    }


def spans_shown(spans: Sequence[tuple[int, int]]) -> str:
    """The iterations of a trouble in words: "iterations 3, 7 to 9"."""
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    return f"iterations {shortened(texts)}"


def _troubles(history: History) -> dict[str, list[tuple[int, int]]]:
    """name -> [first, end) of every stretch of iterations in this trouble; only what there is."""
    if not history.rows:
        return {}
    found = {name: _stretches(rule.ill(history), rule.least) for name, rule in RULES.items()}
    return {name: stretches for name, stretches in found.items() if stretches}


# ---------------------------------------------------------------- series


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """float64[n], with NaN for None and for what is not finite."""
    known = np.array([math.nan if value is None else value for value in values], np.float64)
    return np.where(np.isfinite(known), known, math.nan)


def _stretches(ill: np.ndarray, least: int) -> list[tuple[int, int]]:
    """[first, end) of every run of True that is not shorter than `least`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ill, [False]]).astype(int)))
    runs = edges.reshape(-1, 2).tolist()
    return [(first, end) for first, end in runs if end - first >= least]


def _of_late(ill: np.ndarray) -> np.ndarray:
    """Whether one of the last PATIENCE iterations is."""
    last = np.maximum.accumulate(np.where(ill, np.arange(len(ill)), -PATIENCE))
    return np.arange(len(ill)) - last < PATIENCE


def _trend(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the last PATIENCE values less that of the first ones, and its standard error.

    float64[n] each, for every iteration that far; NaN before there are twice as many.
    """
    change, error = np.full((2, len(values)), math.nan)
    if len(values) >= 2 * PATIENCE:
        first = values[:PATIENCE]
        last = np.lib.stride_tricks.sliding_window_view(values[PATIENCE:], PATIENCE)
        change[2 * PATIENCE - 1 :] = last.mean(1) - first.mean()
        variance = (last.var(1, ddof=1) + first.var(ddof=1)) / PATIENCE
        error[2 * PATIENCE - 1 :] = np.sqrt(variance)
    return change, error


def _gain(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[float, float]:
    """The mean of after - before over prompts, and its standard error.

    NaN for fewer than PROMPTS, or if one is not finite.
    """
    if len(before) != len(after) or len(before) < PROMPTS:
        return math.nan, math.nan
    change = _floats(after) - _floats(before)
    return float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))


# ---------------------------------------------------------------- the group


def _out_of_reach(history: History) -> np.ndarray:
    """Iterations whose scored pixels cannot differ, though those of an earlier pivot do."""
    spread, pivot = history["pixel_std_in_group"], history["pivot"]
    earliest = np.min(pivot[spread > 0], initial=math.inf)
    return (spread == 0) & (pivot > earliest)


def _tell_out_of_reach(history: History, first: int) -> str:
    ill, pivot = _out_of_reach(history), history["pivot"]
    recent = ill[-PATIENCE:]
    return (
        f"in {recent.sum()} of the last {len(recent)} iterations nothing that is scored could"
        f" change: every scored frame lies before the fork of pivot {pivot[ill][-1]:.0f}. Raise"
        " reward.min_behind, or lower reward.clip_spacing"
    )


def _identical(history: History) -> np.ndarray:
    return (history["pixel_std_in_group"] == 0) & ~_out_of_reach(history)


def _tell_identical(history: History, first: int) -> str:
    return (
        "the branches of every group are identical: routing changes nothing. Try more"
        " rollout.perturbed_steps or rollout.window_blocks, fewer window.near, or a longer"
        " window.cache_frames to draw from"
    )


def _equal_groups(history: History) -> np.ndarray:
    """The share of an iteration's prompts whose branches have one and the same reward."""
    shares = {
        iteration: sum(len(set(r["reward"])) == 1 for r in records) / len(records)
        for iteration, records in history.records().items()
    }
    known = _floats([shares.get(int(i)) for i in history.iterations()])
    return np.where(history["reward_std_in_group"] == 0, 1.0, known)


def _no_spread(history: History) -> np.ndarray:
    return (_equal_groups(history) >= 0.5) & (history["pixel_std_in_group"] != 0)


def _tell_no_spread(history: History, first: int) -> str:
    share = _equal_groups(history)[-1]
    return (
        f"the branches differ but in {share:.0%} of the groups their rewards do not, or by their"
        " rounding alone: nothing to learn from there. Is the reward saturated, or coarse?"
    )


def _one_prompt(history: History) -> np.ndarray:
    prompts, share = history["prompts_with_weight"], history["prompt_weight_max"]
    return share > np.maximum(0.5, 2 / np.maximum(prompts, 1))  # never of one prompt or two


def _tell_one_prompt(history: History, first: int) -> str:
    prompts, share = history["prompts_with_weight"][-1], history["prompt_weight_max"][-1]
    records = history.records().get(int(history.iterations()[-1]), [])
    weighed = [record for record in records if record.get("weight") is not None]
    heaviest = max(weighed, key=lambda record: record["weight"], default={"prompt": ()})
    which = shortened([repr(sentence) for sentence in heaviest["prompt"]], 1)
    return (
        f"one of {prompts:.0f} prompts{which and f', {which},'} has {share:.0%} of the weight in"
        " the gradient. "
        + (
            "Its energies are the least distinguishable: try objective.tau_unit=running_std"
            if history.field("objective.tau_unit", "") == "group_std"
            else "Try more train.prompts_per_iteration, or objective.advantage_clip"
        )
    )


# ---------------------------------------------------------------- the update


def _gate(history: History) -> np.ndarray:
    return history["gate_open"] == 0


def _tell_gate(history: History, first: int) -> str:
    learned = "little" if history.field("objective.gate", "") == "mechanism_2" else "nothing"
    return (
        f"no branch has beaten its anchor in {len(history.rows) - first} iterations, so {learned}"
        " is learned. Try fewer rollout.perturbed_steps or rollout.window_blocks (milder routing),"
        " or more rollout.branches"
    )


def _entropy(history: History) -> np.ndarray:
    most = math.log(max(history.field("rollout.branches", 1), 1))
    return history["entropy"] < 0.1 * most


def _tell_entropy(history: History, first: int) -> str:
    return (
        "the policy of a group has collapsed onto one branch for"
        f" {len(history.rows) - first} iterations. Raise objective.tau, or objective.beta"
    )


def _clip(history: History) -> np.ndarray:
    return history["clip_fraction"] > 0.9


def _tell_clip(history: History, first: int) -> str:
    return (
        f"nearly every ratio has been clipped for {len(history.rows) - first} iterations. Lower"
        " train.learning_rate, train.epochs or train.rollouts_per_sync, or raise objective.tau"
    )


def _step_energies(history: History) -> tuple[np.ndarray, np.ndarray]:
    """The energy of a replayed step that routing reaches, and of one that it does not, float[n].

    The second is what rounding makes of 0 (`replay.anchor_energies`). NaN where there is none.
    """
    steps = len(history.field("sampler.steps", ()))
    window = history.field("rollout.window_blocks", 0)
    blocks = max(history.field("replay.blocks", 0), window)
    settled = max(steps - max(history.field("rollout.perturbed_steps", steps), 1), 0)
    if not 0 < settled < steps * blocks:
        unknown = np.full(len(history.rows), math.nan)
        return unknown, unknown
    floor = history["energy_floor"]
    return (history["energy"] - floor) / (steps * blocks - settled), floor / settled


def _floor(history: History) -> np.ndarray:
    routed, floor = _step_energies(history)
    return routed - floor < floor


def _tell_floor(history: History, first: int) -> str:
    routed, floor = (math.sqrt(max(energy[-1], 0)) for energy in _step_energies(history))
    return (
        f"for {len(history.rows) - first} iterations rounding has been as large as what routing"
        f" changes: a replayed velocity is {routed:.1e} from its branch's, and {floor:.1e} where"
        " nothing is routed. The gradient is partly noise. Try model.dtype=float32, or more"
        " rollout.perturbed_steps or rollout.window_blocks"
    )


# ---------------------------------------------------------------- what becomes of the reward


def _flat_means(history: History) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every 2 * FLAT iterations in a row: means of the first and second half, and their std."""
    anchor = history["reward_anchor"]
    if len(anchor) < 2 * FLAT:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    both = np.lib.stride_tricks.sliding_window_view(anchor, 2 * FLAT)
    return both[:, :FLAT].mean(1), both[:, FLAT:].mean(1), both.std(1)


def _flat(history: History) -> np.ndarray:
    before, after, std = _flat_means(history)
    known = after - before < 0.1 * std
    return np.concatenate([np.zeros(len(history.rows) - len(known), bool), known])


def _tell_flat(history: History, first: int) -> str:
    before, after, _ = _flat_means(history)
    return (
        f"the reward of the anchors has not risen in {FLAT} iterations"
        f" ({before[-1]:+.4f} then {after[-1]:+.4f}). Compare a run with"
        " objective.shuffle_advantages; try a larger train.learning_rate, a smaller"
        " objective.beta, more prompts per iteration"
    )


def _heldout_gains(history: History) -> list[tuple[float, float]]:
    """Of every evaluation: what the online policy gains over the reference, and its error."""
    return [_gain(x["reward"]["reference"], x["reward"]["online"]) for x in history.heldout]


def _worse(history: History) -> np.ndarray:
    if not history.heldout:
        return history.evaluated("heldout_online") < history.evaluated("heldout_reference")
    return (
        history.by_evaluation([gain + ERRORS * error for gain, error in _heldout_gains(history)])
        < 0
    )


def _tell_worse(history: History, first: int) -> str:
    policies = "reference", "online"
    before, after = (history.evaluated(f"heldout_{policy}")[-1] for policy in policies)
    if history.heldout:
        rewards = history.heldout[-1]["reward"]
        before, after = (_floats(rewards[policy]).mean() for policy in policies)
    return (
        f"on held-out prompts the policy is worse than the reference, {after:+.4f} instead of"
        f" {before:+.4f}. Try a smaller train.learning_rate, or a larger objective.beta; take the"
        " checkpoint of an earlier iteration"
    )


def _watched(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """component -> gain, and the loss that counts, of what is watched and nothing optimises."""
    before, after = (record["components"][policy] for policy in ("reference", "online"))
    found = {}
    for name in after:
        if name in before and name not in (*record["optimised"], *MAY_FALL):
            gain, error = _gain(before[name], after[name])
            level = float(np.abs(_floats(before[name])).mean())
            found[name] = gain, max(ERRORS * error, FALL * level)
    return found


def _unweighted(history: History) -> list[str]:
    """The components that are scored in training and do not count in the reward."""
    scored = sorted({name for x in history.branches[-1:] for name in x.get("components", ())})
    weight = {name: history.field(f"reward.weights.{name}", 0.0) for name in scored}
    free = [name for name, value in weight.items() if not value and name not in MAY_FALL]
    return free if any(weight.values()) else []


def _falling(history: History) -> dict[str, np.ndarray]:
    """What is said of it -> bool[n]: what nobody optimises and falls while the reward rises."""
    found = {}
    gains = [gain - ERRORS * error for gain, error in _heldout_gains(history)]
    watched = [_watched(record) for record in history.heldout]
    for name in sorted({name for of_record in watched for name in of_record}):
        change = [of_record.get(name, (math.nan, math.nan)) for of_record in watched]
        falls = history.by_evaluation([gain + least for gain, least in change])
        text = f"{name} ({change[-1][0]:+.4f} on held-out prompts)"
        found[text] = (history.by_evaluation(gains) > 0) & (falls < 0)
    rise, rise_error = _trend(history["reward"])
    for name in _unweighted(history):
        fall, error = _trend(history[f"reward_{name}"])
        text = f"{name} ({fall[-1]:+.4f} in training)"
        found[text] = (rise > TREND_ERRORS * rise_error) & (fall < -TREND_ERRORS * error)
    return found


def _hacked(history: History) -> np.ndarray:
    return np.any([np.zeros(len(history.rows), bool), *_falling(history).values()], axis=0)


def _tell_hacked(history: History, first: int) -> str:
    names = [text for text, falls in _falling(history).items() if falls[-1]]
    return (
        f"the reward rises while what nobody optimises falls: {shortened(names)}. The reward may be"
        " exploited: look at the videos; give what falls a weight, raise objective.beta, or take"
        " the checkpoint of an earlier iteration"
    )


# ---------------------------------------------------------------- what the videos look like


def _looks(history: History, name: str) -> np.ndarray:
    """How far a figure of the videos has moved, float[n].

    Held-out videos of the online policy from those of the reference, or else the branches of the
    last iterations from those of the first.
    """
    heldout = history.evaluated(f"heldout_{name}_online")
    change = heldout - history.evaluated(f"heldout_{name}_reference")
    return np.where(np.isnan(change), _trend(history[name])[0], change)


def _drifted(history: History, name: str) -> np.ndarray:
    moved = _looks(history, name)
    return (moved if name == "clipped" else np.abs(moved)) > DRIFT[name]


def _drift(history: History) -> np.ndarray:
    return np.any([_drifted(history, name) for name in DRIFT], axis=0)


def _tell_drift(history: History, first: int) -> str:
    moved = [
        f"{name} {_looks(history, name)[-1]:+.2f}" for name in DRIFT if _drifted(history, name)[-1]
    ]
    return (
        f"the videos drift: {', '.join(moved)} (of 1). Rewards such as VideoAlign's are known to"
        " drive generators into glaring, oversaturated pictures: look at the videos; raise"
        " objective.beta, watch another scorer (eval.scorer), or take the checkpoint of an earlier"
        " iteration"
    )


def _early_losses(history: History) -> list[dict[int, float]]:
    """Of every evaluation: block before every pivot -> what it loses, if that is much.

    More than the later ones, and than EARLY of what they gain; and more than errors explain.
    """
    found = []
    for record, (_, error) in zip(history.heldout, _heldout_gains(history), strict=True):
        before, after = (record["blocks"].get(policy, []) for policy in ("reference", "online"))
        if len(before) != len(after):
            before = after = []
        change, pivot = _floats(after) - _floats(before), record["first_pivot"]
        later = change[pivot:].mean() if len(change) > pivot else math.nan
        least = max(EARLY * abs(later), ERRORS * error)
        early = enumerate(change[:pivot].tolist())
        found.append({block: -x for block, x in early if x < later and -x > least})
    return found


def _early(history: History) -> np.ndarray:
    if history.heldout:
        return history.by_evaluation([float(len(x)) for x in _early_losses(history)]) > 0
    early, later = (history.evaluated(f"heldout_gain_{of}_pivots") for of in ("before", "from"))
    return (early < later) & (-early > EARLY * np.abs(later))


def _tell_early(history: History, first: int) -> str:
    if history.heldout:
        losses = _early_losses(history)[-1]
        said = f"block {', '.join(map(str, losses))} by up to {max(losses.values()):.4f}"
    else:
        said = f"by {-history.evaluated('heldout_gain_before_pivots')[-1]:.4f} on average"
    return (
        f"the first blocks, which no replay reads, get worse: {said}. They change through the"
        " shared weights alone: raise objective.beta, lower train.learning_rate, or take the"
        " checkpoint of an earlier iteration"
    )


# name -> Rule, in the order in which they are told
RULES: dict[str, Rule] = {
    "identical branches": Rule(_identical, _tell_identical),
    "out of reach": Rule(lambda history: _of_late(_out_of_reach(history)), _tell_out_of_reach),
    "no spread": Rule(_no_spread, _tell_no_spread),
    "one prompt": Rule(_one_prompt, _tell_one_prompt),
    "gate": Rule(_gate, _tell_gate, PATIENCE),
    "entropy": Rule(_entropy, _tell_entropy, PATIENCE),
    "clip": Rule(_clip, _tell_clip, PATIENCE),
    "floor": Rule(_floor, _tell_floor, PATIENCE),
    "flat": Rule(_flat, _tell_flat),
    "worse": Rule(_worse, _tell_worse),
    "watched": Rule(_hacked, _tell_hacked),
    "drift": Rule(_drift, _tell_drift),
    "first blocks": Rule(_early, _tell_early),
}


# ---------------------------------------------------------------- in the training loop


class Doctor:
    """Says each trouble once when it begins, and once when it is over."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._rows: list[Mapping[str, Any]] = []
        self._heldout: list[Mapping[str, Any]] = []
        self._known: set[str] = set()

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Notes an evaluation, as heldout.jsonl has it, for the next visit."""
        self._heldout.append(record)

    def visit(
        self, metrics: Mapping[str, Any], branches: Sequence[Mapping[str, Any]] = ()
    ) -> list[str]:
        """The new lines to print after an iteration.

        Args:
          metrics: of the iteration.
          branches: its records of branches.
        """
        self._rows.append(metrics)
        now = examine(self._config, self._rows, branches, self._heldout)
        lines = [f"  doctor: {found.text}" for found in now if found.name not in self._known]
        names = {found.name for found in now}
        lines += [f"  doctor: over: {name}" for name in RULES if name in self._known - names]
        self._known = names
        return lines
