"""Statistics of held-out rewards and of videos: gains, intervals, win rates, distances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvpo_jax.errors import UsageError

RESAMPLES = 2000  # of the prompts, for a bootstrap interval


def heldout_summary(
    reference: np.ndarray, online: np.ndarray, ema: np.ndarray
) -> dict[str, float | int | list[float] | None]:
    """Sums up the rewards float[n] of three policies for the same n prompts and noise.

    Returns:
      Their mean rewards; `gain` of online over reference with its interval `gain_ci95`, see
      `paired_gain`; `win_rate` of online; the same of the average, `ema_gain` and so on;
      `num_prompts`.
    """
    gain, interval = paired_gain(reference, online)
    ema_gain, ema_interval = paired_gain(reference, ema)
    return {
        "reference": float(np.mean(reference)),
        "online": float(np.mean(online)),
        "ema": float(np.mean(ema)),
        "gain": gain,
        "gain_ci95": interval,
        "win_rate": win_rate(reference, online),
        "ema_gain": ema_gain,
        "ema_gain_ci95": ema_interval,
        "ema_win_rate": win_rate(reference, ema),
        "num_prompts": len(reference),
    }


def paired_gain(reference: np.ndarray, policy: np.ndarray) -> tuple[float, list[float] | None]:
    """Returns the mean of policy - reference, float[n] each, and its interval: `mean_interval`."""
    return mean_interval(_differences(reference, policy))


def win_rate(reference: np.ndarray, policy: np.ndarray) -> float:
    """Returns the share of prompts, float[n], with policy above reference; a tie counts half."""
    return float(np.mean(0.5 * (np.sign(_differences(reference, policy)) + 1)))


def mean_interval(values: np.ndarray) -> tuple[float, list[float] | None]:
    """Returns the mean of float[n] and its 95 % Student-t interval [low, high].

    A single value says nothing of its spread: its interval is None (null in JSON).

    Raises:
      UsageError: there are no values, or they are not a vector.
    """
    from scipy import stats  # takes half a second, and is needed once, at the end of a run

    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise UsageError(f"a mean needs a vector of one value or more, not shape {values.shape}")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, None
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, [mean - half, mean + half]


def bootstrap_interval(values: np.ndarray) -> tuple[float, list[float] | None]:
    """Returns the mean of float[n] and the interval [low, high] of 95 % of resampled means.

    The n values are drawn anew RESAMPLES times, always the same draws. A single value has no
    interval: None.
    """
    values = np.asarray(values, np.float64)
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return mean, np.quantile(values[drawn].mean(axis=1), (0.025, 0.975)).tolist()


def pairwise(arrays: Sequence[np.ndarray]) -> dict[str, Any]:
    """Sums up how far arrays of one shape are apart; the first is the anchor of the others.

    Args:
      arrays: [n, ...], float, or uint8 of pixels, of which 255 is 1.

    Returns:
      `matrix`, the RMS differences float[m, m]; `mean` of the pairs of others, None if there is
      none; `to_anchor`, the mean of the others' differences to it.
    """
    matrix = np.zeros((len(arrays), len(arrays)))
    for i, j in itertools.combinations(range(len(arrays)), 2):
        matrix[i, j] = matrix[j, i] = _rms_difference(arrays[i], arrays[j])
    pairs = matrix[1:, 1:][np.triu_indices(len(arrays) - 1, 1)]
    return {
        "matrix": matrix.tolist(),
        "mean": float(pairs.mean()) if pairs.size else None,
        "to_anchor": float(matrix[0, 1:].mean()),
    }


def _rms_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Frame by frame, because videos are large."""
    scale = 255.0 if a.dtype == np.uint8 else 1.0
    frames = zip(a, b, strict=True)
    squares = [np.mean((x.astype(np.float32) - y.astype(np.float32)) ** 2) for x, y in frames]
    return float(np.sqrt(np.mean(squares, dtype=np.float64)) / scale)


def show_interval(interval: list[float] | None) -> str:
    """Formats an interval for a table; "-" if there is none."""
    return "-" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def heldout_table(
    rewards: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[list[str], list[list[str]]]:
    """Makes the columns and rows of the table that a run ends with, for `progress.table`.

    Args:
      rewards: policy -> column -> float[n], for the same n prompts and noise. The first policy is
        the one that the others are compared with, the first column the reward that the gain is of.
    """
    first, *others = rewards
    columns = list(rewards[first])
    means = {
        policy: {column: float(np.mean(values[column])) for column in columns}
        for policy, values in rewards.items()
    }
    before, gains = rewards[first][columns[0]], {}
    for policy in others:
        after = rewards[policy][columns[0]]
        gains[policy] = (*paired_gain(before, after), win_rate(before, after))
    return _table(means, gains)


def summary_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Makes the table that a run ended with from what its summary.json holds."""
    heldout, components = summary["heldout"], summary["components"]
    means = {
        policy: {"reward": heldout[policy], **components[policy]}
        for policy in ("reference", "online", "ema")
    }
    gains = {
        policy: tuple(heldout[f"{of}{what}"] for what in ("gain", "gain_ci95", "win_rate"))
        for policy, of in (("online", ""), ("ema", "ema_"))
    }
    return _table(means, gains)


def _table(
    means: Mapping[str, Mapping[str, float]], gains: Mapping[str, tuple[Any, ...]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of policies, the first of which has no gain.

    What the gain is of stands first, and beside it the gain: there may be many columns.

    Args:
      means: policy -> column -> mean.
      gains: policy -> gain over the first, its interval, win rate.
    """
    first, *_ = means
    reward, *others = means[first]
    rows = []
    for policy, values in means.items():
        compared = ["", "", ""]
        if policy in gains:
            gain, interval, wins = gains[policy]
            compared = [f"{gain:+.4f}", show_interval(interval), f"{wins:.0%}"]
        mean, *of_others = (f"{value:.4f}" for value in values.values())
        rows.append([policy, mean, *compared, *of_others])
    return ["policy", reward, f"gain over {first}", "95 % interval", "win rate", *others], rows


def _differences(reference: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """Returns policy - reference, float64[n]; UsageError if they differ in n."""
    if np.shape(reference) != np.shape(policy):
        raise UsageError(f"rewards of {np.shape(policy)} and of {np.shape(reference)} prompts")
    return np.asarray(policy, np.float64) - np.asarray(reference, np.float64)
