"""Scorers by name: "hpsv3,videoalign" of the paper, "motion", "toy", or a function of your own as "module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from kvpo_jax.rewards import hpsv3, motion, toy, videoalign
from kvpo_jax.rewards.composite import Scorer
from kvpo_jax.types import Array

# Name -> from the paths of converted weights to the scorer.
SCORERS: dict[str, Callable[[Mapping[str, str]], Scorer]] = {
    "hpsv3": lambda paths: hpsv3.load(paths["hpsv3"]),
    "videoalign": lambda paths: videoalign.load(paths["videoalign"]),
    "motion": lambda paths: motion.score,
    "toy": lambda paths: toy.score,
}
# Name -> its components, so that they are known before weights are loaded.
COMPONENTS = {
    "hpsv3": ("VQ", "VQ_best"),
    "videoalign": ("MQ", "TA", "videoalign_VQ", "videoalign_MQ", "Overall"),
    "motion": ("motion", "smoothness"),
    "toy": ("VQ", "MQ", "TA"),
}


def names_of(names: str) -> list[str]:
    """The names in a list that commas separate."""
    return [name.strip() for name in names.split(",") if name.strip()]


def components_of(names: str) -> list[str] | None:
    """The components of a list of names; None if a function of your own is there, which tells its own as it scores."""
    listed = names_of(names)
    return [x for name in listed for x in COMPONENTS[name]] if COMPONENTS.keys() >= set(listed) else None


class Rewards:
    """One scorer with the components of all that `names` lists.

    Weights are loaded when a clip is scored for the first time, and again after `release`.

    Args:
      names: keys of SCORERS and "module:function"s, separated by commas; nothing has no components.
      paths: "hpsv3" and "videoalign" -> converted weights, for those that are named.

    Raises:
      ValueError: for a name that is neither, or a function that cannot be imported.
    """

    def __init__(self, names: str, paths: Mapping[str, str]):
        loaders = {name: SCORERS[name] if name in SCORERS else _custom(name) for name in names_of(names)}
        self._names = names
        self._loaded = cache(lambda: {name: load(paths) for name, load in loaders.items()})

    def __call__(self, pixels: Array, prompts: Sequence[str]) -> dict[str, Array]:
        """See `composite.Scorer`."""
        components: dict[str, Array] = {}
        for name, scorer in self._loaded().items():
            own = scorer(pixels, prompts)
            if twice := components.keys() & own.keys():
                raise ValueError(
                    f"two rewards of {self._names!r} have a component {min(twice)!r}; {name!r} is the second"
                )
            components |= own
        return components

    def release(self) -> None:
        """Lets go of the weights."""
        self._loaded.cache_clear()


def _custom(name: str) -> Callable[[Mapping[str, str]], Scorer]:
    module, _, function = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(SCORERS)
        raise ValueError(f"there is no reward {name!r}: expected {known} or module:function ({error})") from error
    return lambda paths: scorer
