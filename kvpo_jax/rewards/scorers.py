"""Scorers by name: the paper's "hpsv3,videoalign", VBench's "clip,dino,aesthetic", "motion", "toy",
"return", "module:function".

The last is a function of your own, see `composite.Scorer`. "stream" and "flow" score whole videos.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.errors import UsageError
from kvpo_jax.rewards import (
    aesthetic,
    clip,
    dino,
    hpsv3,
    motion,
    optical_flow,
    preprocess,
    returning,
    stream,
    toy,
    videoalign,
)
from kvpo_jax.rewards.composite import Footage, Scorer, Shared, VideoScorer
from kvpo_jax.types import Array

Paths = Mapping[str, str]  # a name of LEARNED -> file of converted weights

# Name of a scorer with weights -> how it is loaded from their file, which config.paths has.
LEARNED: dict[str, Callable[[str], Scorer]] = {
    "hpsv3": hpsv3.load,
    "videoalign": videoalign.load,
    "clip": clip.load,
    "dino": dino.load,
    "aesthetic": aesthetic.load,
}


def _from_file(name: str) -> Callable[[Paths], Scorer]:
    return lambda paths: LEARNED[name](paths[name])


# Name -> how its scorer is loaded.
SCORERS: dict[str, Callable[[Paths], Scorer]] = {
    **{name: _from_file(name) for name in LEARNED},
    "motion": lambda paths: motion.score,
    "toy": lambda paths: toy.score,
    "return": lambda paths: returning.score,
}
# Scorers of whole videos, see `composite.VideoScorer`: they are watched and never optimised.
OF_VIDEOS: dict[str, VideoScorer] = {"stream": stream.score, "flow": optical_flow.score}
# Name -> its components, so that the weights in a config are checked before weights are loaded.
COMPONENTS = {
    "hpsv3": ("VQ", "VQ_best"),
    "videoalign": ("MQ", "TA", "videoalign_VQ", "videoalign_MQ", "Overall"),
    "clip": ("clip_score", "clip_score_all", "background_consistency"),
    "dino": ("subject_consistency",),
    "aesthetic": ("aesthetic_quality",),
    "motion": ("motion", "smoothness"),
    "toy": ("VQ", "MQ", "TA"),
    "return": ("SC", "VQ", "wanted", "shown", "other"),
    "stream": (
        "temporal_flickering",
        "unfrozen",
        "exposure_kept",
        "saturation_kept",
        "sharpness_kept",
        "continuity",
    ),
    "flow": ("flow", "flow_continuity"),
}
# Scorers of the package that anybody can use at once; "return" needs a whole story of its world.
WITHOUT_FILES = ("motion", "toy")
# Scorers of uint8 pixels, of which floats would be a copy four times as large.
TAKES_BYTES = tuple(LEARNED)
# Scorers that read frames one by one, and a frame of `composite.Shared` clips once.
OF_FRAMES = ("hpsv3", "clip", "dino", "aesthetic")


def names_of(names: str) -> list[str]:
    """The names in a list that commas separate."""
    return [name.strip() for name in names.split(",") if name.strip()]


def components_of(names: str) -> list[str] | None:
    """The components of a list of names.

    None if the list has a "module:function": its components are not known before it scores.
    """
    listed = names_of(names)
    if not COMPONENTS.keys() >= set(listed):
        return None
    return [component for name in listed for component in COMPONENTS[name]]


class Scorers:
    """One scorer with the components of all scorers in a list.

    A module is imported when its scorer is checked or first used, so never by a command that does
    not score. Weights are loaded when a clip is scored for the first time, and again after
    `release`.

    Args:
      names: keys of SCORERS and OF_VIDEOS and "module:function"s, separated by commas. An empty
        list is a scorer without components.
      paths: the files of the scorers that need one.
    """

    def __init__(self, names: str, paths: Paths):
        self._names = names
        self._whole = [name for name in names_of(names) if name in OF_VIDEOS]
        self._of_clips = [name for name in names_of(names) if name not in OF_VIDEOS]
        self._loaded = cache(lambda: {name: _loader(name)(paths) for name in self._of_clips})

    def check(self) -> None:
        """Imports the functions, and loads no weights.

        Raises:
          UsageError: a name is not a scorer, or a function cannot be imported.
        """
        for name in self._of_clips:
            _loader(name)

    def __call__(
        self, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
    ) -> dict[str, Array]:
        """See `composite.Scorer`.

        Args:
          pixels: [n, frames, h, w, 3], float in [0, 1] or uint8. Scorers get floats, except those
            of TAKES_BYTES, which get what is given.
          prompts: n sentences.
          shared: which frames are the same in several clips, if there are any.

        Raises:
          UsageError: two scorers have a component of the same name, or one returns something else
            than a number per clip for each of its components.
        """
        components: dict[str, Array] = {}
        floats = cache(lambda: preprocess.to_float(pixels))
        of_videos = {component for name in self._whole for component in COMPONENTS[name]}
        for name, scorer in self._loaded().items():
            taken = pixels if name in TAKES_BYTES else floats()
            told = {"shared": shared} if shared and name in OF_FRAMES else {}
            scores = _checked(name, scorer(taken, prompts, **told), len(prompts))
            if twice := (components.keys() | of_videos) & scores.keys():
                raise UsageError(
                    f"two rewards of {self._names!r} have a component {min(twice)!r}; {name!r} is"
                    " the second"
                )
            components |= scores
        return components

    def of_videos(self, pixels: Array, footage: Footage) -> dict[str, Array | np.ndarray]:
        """The components of the list's scorers of videos, see `composite.VideoScorer`."""
        scores = [OF_VIDEOS[name](pixels, footage) for name in self._whole]
        return {name: values for of_scorer in scores for name, values in of_scorer.items()}

    def release(self) -> None:
        """Frees the weights."""
        self._loaded.cache_clear()


def _checked(name: str, scores: Any, clips: int) -> dict[str, Array]:
    """What scorer `name` returned for so many clips, as arrays of that many numbers.

    Lists of numbers are taken too.
    """
    if not isinstance(scores, Mapping) or not scores:
        nothing = scores is None or isinstance(scores, Mapping)  # an empty one
        shape = getattr(scores, "shape", None)
        kind = f"a {type(scores).__name__}" if shape is None else f"an array of shape {shape}"
        returned = "nothing" if nothing else kind
        raise UsageError(
            f"reward {name} returned {returned}, expected a dict {{component: {clips} numbers}}"
        )
    if strange := [component for component in scores if not isinstance(component, str)]:
        raise UsageError(f"reward {name}: the component {strange[0]!r} is no name, expected a str")
    return {
        component: _numbers(f"reward {name}: {component!r}", values, clips)
        for component, values in scores.items()
    }


def _numbers(what: str, values: Any, clips: int) -> Any:
    """The `values` of a component as an array of so many numbers; UsageError about `what`."""
    expected = f"expected one number for each of {clips} clips"
    try:
        array = values if isinstance(values, jax.Array) else np.asarray(values)
    except Exception as error:  # lists of unlike lengths, tensors that need a gradient, ...
        raise UsageError(f"{what} is no array ({error}), {expected}") from error
    numeric = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, bool))
    if array.shape != (clips,):
        raise UsageError(f"{what} has the shape {array.shape}, {expected}")
    if not numeric:
        raise UsageError(f"{what} is of type {array.dtype}, {expected}")
    return array


def _explained(name: str, error: BaseException) -> UsageError:
    """The error for what somebody's own function raises: in one line, with the place in its file.

    The original is the cause, for who calls it from Python.
    """
    own = sys.modules[name.partition(":")[0]].__file__
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename == own]
    text = traceback.format_exception_only(error)[-1].strip()
    message = textwrap.shorten(text, 300, placeholder=" ...")
    at = f", at {places[-1]}" if places else ""
    return UsageError(f"reward {name} raised {message}{at}")


def _module_of(name: str) -> ModuleType:
    """The module of a scorer "module:function"."""
    return importlib.import_module(name.partition(":")[0])


def sources(names: str) -> dict[str, Path]:
    """ "module:function" -> the file of its module, for those in a list that have one."""
    own = [name for name in names_of(names) if name not in {*SCORERS, *OF_VIDEOS}]
    files = {name: _module_of(name).__file__ for name in own}
    return {name: Path(file) for name, file in files.items() if file is not None}


def _loader(name: str) -> Callable[[Paths], Scorer]:
    """How a scorer is loaded; "module:function" is imported at once."""
    if name in SCORERS:
        return SCORERS[name]
    known = f"expected {', '.join((*SCORERS, *OF_VIDEOS))} or module:function"
    try:
        scorer = getattr(_module_of(name), name.partition(":")[2])
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"there is no reward {name!r}: {known} ({error})") from error
    except Exception as error:  # whatever the module does while it is imported
        text = "; ".join(map(str.strip, traceback.format_exception_only(error)))
        raise UsageError(f"reward {name} cannot be imported: {text}") from error
    if not callable(scorer):
        raise UsageError(f"reward {name} is a {type(scorer).__name__}: {known}")

    def score(pixels: Array, prompts: Sequence[str]) -> Mapping[str, Array]:
        try:
            return scorer(pixels, prompts)
        except (UsageError, jax.errors.JaxRuntimeError):
            raise
        except (Exception, SystemExit) as error:
            raise _explained(name, error) from error

    return lambda paths: score
