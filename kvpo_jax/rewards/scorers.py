"""Scorers by name: the paper's "hpsv3,videoalign", VBench's "clip,dino,aesthetic", "motion", "toy",
"return", "module:function".

The last is a function of your own, see `composite.Scorer`. "stream" and "flow" score whole videos.
An address, "http://host:port", is a reward server, see `remote`.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.rewards import (
    aesthetic,
    clip,
    dino,
    hpsv3,
    motion,
    optical_flow,
    preprocess,
    remote,
    returning,
    stream,
    toy,
    videoalign,
)
from kvpo_jax.rewards.composite import Footage, Scorer, Shared, VideoScorer
from kvpo_jax.runtime import checkpoint, web
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Array

Paths = Mapping[str, str]  # a name of LEARNED -> file of converted weights

Asked = dict[str, Callable[[], Mapping[str, Any]]]  # scorer -> what waits for its components

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


def check_known(names: str) -> None:
    """UsageError for a name in a list that no scorer has; nothing is imported, and no server asked.

    So whatever has a colon is taken to be a "module:function" or an address.
    """
    for name in names_of(names):
        if not (name in SCORERS or name in OF_VIDEOS or ":" in name):
            ours = (*SCORERS, *OF_VIDEOS)
            raise UsageError(f"there is no reward {name!r}: {_expected()}{nearest(name, ours)}")


def components_of(names: str) -> list[str] | None:
    """The components of a list of names.

    None if the list has a "module:function", whose components are not known before it scores, or a
    server, which is asked by `Scorers.components`.
    """
    listed = names_of(names)
    if not COMPONENTS.keys() >= set(listed):
        return None
    return [component for name in listed for component in COMPONENTS[name]]


def takes_bytes(name: str) -> bool:
    """Whether a scorer is given uint8 pixels where they are stored."""
    return name in TAKES_BYTES or web.is_address(name)


class Scorers:
    """One scorer with the components of all scorers in a list.

    A module is imported when its scorer is checked or first used, so never by a command that does
    not score, and a server is asked no earlier. Weights are loaded when a clip is scored for the
    first time, and again after `release`.

    Args:
      names: keys of SCORERS and OF_VIDEOS, "module:function"s and addresses of servers, separated
        by commas. An empty list is a scorer without components.
      paths: the files of the scorers that need one.
      http: section reward.http of a config; None is its default.
      fps: frames per second of the clips, which servers are told; None if nobody knows.

    Attributes:
      waits: whether there are servers, whose scores are waited for.
      servers: address -> server.
    """

    def __init__(
        self,
        names: str,
        paths: Paths,
        http: Mapping[str, Any] | None = None,
        fps: float | None = None,
    ):
        self._names, self._paths = names, paths
        self._whole = [name for name in names_of(names) if name in OF_VIDEOS]
        self._of_clips = [name for name in names_of(names) if name not in OF_VIDEOS]
        addresses = [name for name in self._of_clips if web.is_address(name)]
        self.waits = bool(addresses)
        if addresses and http is None:
            http = config_lib.load(str(config_lib.shipped(config_lib.TINY))).reward.http
        self.servers = {
            url: remote.Server(url, remote.Settings(**http or {}), fps) for url in addresses
        }
        here = [name for name in self._of_clips if name not in self.servers]
        self._loaded = cache(lambda: {name: _loader(name)(paths) for name in here})

    def check(self) -> None:
        """Imports the functions and asks the servers what they are; of weights it reads what they
        are of, and not the numbers.

        Raises:
          UsageError: a name is not a scorer, a function cannot be imported, a file is of another
            kind, or a server does not answer as it should.
        """
        for name in self._of_clips:
            if name not in self.servers:
                _loader(name)
            if name in LEARNED and self._paths.get(name):
                checkpoint.metadata_config(self._paths[name], name)
        for server in self.servers.values():
            _ = server.about

    def components(self) -> list[str] | None:
        """The components of the list; None if they are not known before it scores."""
        here = components_of(",".join(x for x in names_of(self._names) if x not in self.servers))
        if here is None:
            return None
        return [*here, *(x for server in self.servers.values() for x in server.about.components)]

    def needs_groups(self) -> bool:
        """Whether a server has to see the branches of a prompt together."""
        return any(server.about.groups for server in self.servers.values())

    def versions(self) -> dict[str, str]:
        """ "server 1", ... -> what the scores of the servers depend on, in their own words.

        Their addresses are no part of it: a continued run may find them elsewhere.
        """
        return {
            f"server {i + 1}": f"{server.about.name} {server.about.version}"
            for i, server in enumerate(self.servers.values())
        }

    def missing(self) -> int:
        """How many clips have got reward.http.missing instead of a server's scores so far."""
        return sum(server.missing for server in self.servers.values())

    def load(self) -> None:
        """Loads the weights now."""
        self._loaded()

    def __call__(
        self, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
    ) -> dict[str, Array]:
        """See `composite.Scorer` and `ask`."""
        return self.ask(pixels, prompts, shared)()

    def ask(
        self, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
    ) -> Callable[[], dict[str, Array]]:
        """Sends clips to the servers and lets the other scorers score them.

        The pixels may be freed before the servers answer.

        Args:
          pixels: [n, frames, h, w, 3], float in [0, 1] or uint8. Scorers get floats, except those
            of TAKES_BYTES, which get what is given.
          prompts: n sentences.
          shared: which frames are the same in several clips, if there are any.

        Returns:
          () -> component -> float[n], which waits for the servers.

        Raises:
          UsageError: two scorers have a component of the same name, or one returns something else
            than a number per clip for each of its components. What servers do wrong is raised by
            what is returned.
        """
        answers: Asked = {url: server.ask(pixels, prompts) for url, server in self.servers.items()}
        floats = cache(lambda: preprocess.to_float(pixels))
        for name, scorer in self._loaded().items():
            taken = pixels if name in TAKES_BYTES else floats()
            told = {"shared": shared} if shared and name in OF_FRAMES else {}
            answers[name] = partial(
                dict, _checked(name, scorer(taken, prompts, **told), len(prompts))
            )
        return partial(self._joined, answers)

    def _joined(self, answers: Asked) -> dict[str, Array]:
        """The components of all scorers, in the order of the list."""
        components: dict[str, Array] = {}
        of_videos = {component for name in self._whole for component in COMPONENTS[name]}
        for name in self._of_clips:
            scores = answers[name]()
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
    own = [
        name
        for name in names_of(names)
        if name not in {*SCORERS, *OF_VIDEOS} and not web.is_address(name)
    ]
    files = {name: _module_of(name).__file__ for name in own}
    return {name: Path(file) for name, file in files.items() if file is not None}


def _expected() -> str:
    """What the name of a scorer can be, for an error message."""
    return f"expected {', '.join((*SCORERS, *OF_VIDEOS))}, module:function or http://host:port"


def _loader(name: str) -> Callable[[Paths], Scorer]:
    """How a scorer is loaded; "module:function" is imported at once."""
    if name in SCORERS:
        return SCORERS[name]
    try:
        scorer = getattr(_module_of(name), name.partition(":")[2])
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"there is no reward {name!r}: {_expected()} ({error})") from error
    except Exception as error:  # whatever the module does while it is imported
        text = "; ".join(map(str.strip, traceback.format_exception_only(error)))
        raise UsageError(f"reward {name} cannot be imported: {text}") from error
    if not callable(scorer):
        raise UsageError(f"reward {name} is a {type(scorer).__name__}: {_expected()}")

    def score(pixels: Array, prompts: Sequence[str]) -> Mapping[str, Array]:
        try:
            return scorer(pixels, prompts)
        except (UsageError, jax.errors.JaxRuntimeError):
            raise
        except (Exception, SystemExit) as error:
            raise _explained(name, error) from error

    return lambda paths: score
