"""From videos to the scores of a group: which clips are scored, and how components are weighted.

The global signal scores one clip per prompt segment and averages over the segments (paper §3.4; the
released code's clips are 36 frames in the middle of each segment); a long segment has several. The
local signal of the released code scores the chunk that contains the fork.

What comes before the fork is the same in all trajectories of a prompt, and is scored once.

Everything above `ask_clips` is arithmetic on Python ints. Windows are half open, [start, end).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import chex
import jax.numpy as jnp
import numpy as np

from kvpo_jax.errors import NotFiniteError, UsageError
from kvpo_jax.runtime import progress
from kvpo_jax.types import Array, Pixels, Scores, Windows

ZERO = np.zeros((), np.float32)  # what sums of scores begin with
P = ParamSpec("P")
T = TypeVar("T")
Answers = Callable[[], dict[str, np.ndarray]]  # component -> scores, which are waited for


class Scorer(Protocol):
    """A reward: any function of clips and of the sentence of each clip."""

    def __call__(self, pixels: Array, prompts: Sequence[str], /) -> Mapping[str, Array]:
        """The components of the reward by name.

        Args:
          pixels: float[n, frames, h, w, 3] in [0, 1]. `scorers.Scorers` makes them of uint8, which
            only the scorers that it says so of are given.
          prompts: n sentences, each a `Sentence`.

        Returns:
          component -> float[n].
        """
        ...


class Sentence(str):
    """The sentence of a clip, which knows what was said before it, and whom the clip competes with.

    Attributes:
      before: the sentences of its sequence before it, none for a sentence that stands alone.
      group: a number that the clips of one prompt sequence have in common, which come in a row: the
        branches and the anchor, or one clip of what is the same in all.
    """

    before: tuple[str, ...] = ()
    group: int = 0

    @classmethod
    def with_context(cls, text: str, before: Sequence[str], group: int) -> Sentence:
        """A sentence with its attributes."""
        sentence = cls(text)
        sentence.before, sentence.group = tuple(before), group
        return sentence

    @classmethod
    def of(cls, sequence: Sequence[str], segment: int) -> Sentence:
        """The sentence of a prompt segment of a sequence."""
        return cls.with_context(sequence[segment], sequence[:segment], 0)


@dataclasses.dataclass(frozen=True)
class Footage:
    """The frames of a video that are scored, of all its clips.

    Attributes:
      rows: where they are in the pixels.
      frames: their numbers in the whole video, ascending.
      starts: the pixel frames at which the generator's blocks begin; none if nobody knows.
    """

    rows: np.ndarray
    frames: np.ndarray
    starts: np.ndarray

    def following(self) -> np.ndarray:
        """Whether each frame but the first follows the one before it, bool[frames - 1].

        Raises:
          UsageError: none does.
        """
        following = np.diff(self.frames) == 1
        if not following.any():
            raise UsageError("whole videos are scored on clips of two frames or more")
        return following

    def seams(self) -> np.ndarray:
        """Whether a block begins at the second frame of each pair that follows, bool[pairs]."""
        return np.isin(self.frames[1:], self.starts)[self.following()]


class VideoScorer(Protocol):
    """A reward of whole videos, which is watched and not optimised."""

    def __call__(self, pixels: Array, footage: Footage, /) -> Mapping[str, Array | np.ndarray]:
        """The components of the reward by name, float[n] each.

        Args:
          pixels: [n, m, h, w, 3], float in [0, 1] or uint8.
          footage: which frames of the video they are.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Shared:
    """Clips that begin alike: of every `clips` in a row, the first `frames` frames are the same."""

    clips: int
    frames: int


# ---------------------------------------------------------------- frames, segments, clips


@dataclasses.dataclass(frozen=True)
class Clipping:
    """Which frames of a video are scored.

    Attributes:
      switch_frames: ascending latent frames at which the next prompt segment begins.
      clip_frames: pixel frames of a clip, which may reach beyond a short segment; 0 scores the
        whole segment.
      to_pixel: latent frame -> its first pixel frame.
      spacing: a segment has one clip for every so many pixel frames, and at least one; 0 is one.
    """

    switch_frames: Sequence[int]
    clip_frames: int
    to_pixel: Callable[[int], int]
    spacing: int = 0


@dataclasses.dataclass(frozen=True)
class Clip:
    """Pixel frames [start, end), scored with the sentence of a prompt segment."""

    segment: int
    start: int
    end: int


def latent_to_pixel(frame: int, stride: int = 4) -> int:
    """The first pixel frame of a latent frame of the Wan VAE.

    Latent frame 0 is one pixel frame, every other latent frame is `stride` of them.
    """
    return 1 + stride * (frame - 1) if frame > 0 else 0


def clip_window(center: int, total: int, clip_len: int) -> tuple[int, int]:
    """[start, end) of `clip_len` of `total` frames, around `center` where the borders allow.

    It is the whole video if that has fewer frames.
    """
    end = min(max(center - clip_len // 2, 0) + clip_len, total)
    return max(end - clip_len, 0), end


def segment_clips(total: int, segments: int, clipping: Clipping) -> list[Clip]:
    """The clips of a video: each prompt segment is cut into equal parts, with a clip in the middle.

    A segment is one part, or several if it is long (`Clipping.spacing`).

    Args:
      total: pixel frames of the video.
      segments: M. Only the first M - 1 switches are used.
      clipping: see Clipping.

    Returns:
      Clips in order. A segment that has fewer than two frames in the video has no clip.

    Raises:
      UsageError: there are fewer than M - 1 switches, or no segment has two frames.
    """
    switches, clip_frames = clipping.switch_frames, clipping.clip_frames
    if len(switches) < segments - 1:
        raise UsageError(
            f"{segments} prompts need {segments - 1} switch frames, got {tuple(switches)}"
        )
    inner = (min(clipping.to_pixel(f), total) for f in switches[: segments - 1])
    clips = []
    for m, (start, end) in enumerate(itertools.pairwise((0, *inner, total))):
        if end - start < 2:
            continue
        if not clip_frames:
            clips.append(Clip(m, start, end))
            continue
        parts = max(1, round((end - start) / clipping.spacing)) if clipping.spacing else 1
        for part in range(parts):
            center = start + (end - start) * (2 * part + 1) // (2 * parts)
            clips.append(Clip(m, *clip_window(center, total, clip_frames)))
    if not clips:
        raise UsageError(f"no prompt segment of {total} pixel frames has two frames to score")
    return clips


def share_behind(clips: Sequence[Clip], frame: int) -> float:
    """The share of the scored frames that are pixel frame `frame` or a later one, in [0, 1]."""
    behind = sum(max(clip.end - max(clip.start, frame), 0) for clip in clips)
    return behind / sum(clip.end - clip.start for clip in clips)


# ---------------------------------------------------------------- scores


def at_once(ask: Callable[P, Callable[[], T]]) -> Callable[P, T]:
    """The function that asks as `ask` does, and waits for the answer."""

    @functools.wraps(ask)
    def score(*arguments: P.args, **named: P.kwargs) -> T:
        return ask(*arguments, **named)()

    return score


def ask_clips(scorer: Scorer, clips: Array, sentences: Sequence[str], shared: int = 0) -> Answers:
    """Scores one clip per trajectory in a single call of the scorer.

    Args:
      scorer: see Scorer; it is told `Shared` clips, if there are any, as the argument `shared`. One
        with an attribute `waits` that is true is called by its method `ask`, see
        `scorers.Scorers.ask`, and its scores are waited for later.
      clips: [P, T, frames, h, w, 3], of a dtype that the scorer takes.
      sentences: P sentences, one per prompt sequence.
      shared: so many frames, the first ones, are the same in all T clips of a prompt.

    Returns:
      () -> component -> float[P, T].

    Raises:
      NotFiniteError: a score is not finite; names component, prompt and trajectory.
    """
    p, t = clips.shape[:2]
    chex.assert_shape(clips, (p, t, None, None, None, 3))
    chex.assert_equal(len(sentences), p)
    per_clip = [
        Sentence.with_context(sentence, getattr(sentence, "before", ()), group)
        for group, sentence in enumerate(sentences)
        for _ in range(t)
    ]
    told = {"shared": Shared(t, shared)} if shared and t > 1 else {}

    def finite(raw: Mapping[str, Array]) -> dict[str, np.ndarray]:
        return {name: _finite(name, values, sentences, t) for name, values in raw.items()}

    flat = clips.reshape(p * t, *clips.shape[2:])
    if getattr(scorer, "waits", False):
        answers = scorer.ask(flat, per_clip, **told)  # type: ignore[attr-defined]
        return lambda: finite(answers())
    scores = finite(scorer(flat, per_clip, **told))
    return lambda: scores


def _finite(name: str, values: Array | np.ndarray, sentences: Sequence[str], t: int) -> np.ndarray:
    """The scores float[P * T] of a component as float[P, T]; NotFiniteError if one is not."""
    chex.assert_shape(values, (len(sentences) * t,))
    with np.errstate(over="ignore"):  # a float64 that is too large is infinite here
        scores = np.asarray(values, np.float32).reshape(len(sentences), t)
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        prompt, trajectory = bad[0]
        which = f", trajectory {trajectory} of {t} (branches first, then the anchor)"
        raise NotFiniteError(
            f"reward {name} is {scores[prompt, trajectory]} for prompt {prompt}"
            f" ({sentences[prompt]!r}){which if t > 1 else ''}"
        )
    return scores


def ask_clip(
    scorer: Scorer, pixels: Pixels, start: int, end: int, sentences: Sequence[str]
) -> Answers:
    """Scores frames [start, end) of all trajectories, and what they share once.

    Returns:
      () -> component -> float[P, T], or float[P, T + 1] with an anchor, which is the last.
    """
    clips, shared = _cut(pixels, start, end), min(max(pixels.fork - start, 0), end - start)
    whole = (len(sentences), pixels.videos.shape[1] + (pixels.anchor is not None))
    answers = ask_clips(scorer, clips, sentences, shared)
    return lambda: {name: np.broadcast_to(x, whole) for name, x in answers().items()}


def ask_each(
    scorer: Scorer, pixels: Pixels, prompts: Sequence[Sequence[str]], clips: Sequence[Clip]
) -> Callable[[], list[dict[str, np.ndarray]]]:
    """Scores every clip with the sentence of its segment.

    Args:
      scorer: see Scorer; called once per clip, with those of all prompts.
      pixels: at least the frames of the clips.
      prompts: P sequences of M sentences.
      clips: see `segment_clips`.

    Returns:
      () -> of each clip, component -> float[P, T], or float[P, T + 1] with an anchor, which is
      the last.
    """
    segments = len(prompts[0])
    if any(len(sequence) != segments for sequence in prompts):
        raise UsageError(
            f"prompt sequences of different lengths: {[len(sequence) for sequence in prompts]}"
        )
    asked = [
        ask_clip(
            scorer,
            pixels,
            clip.start,
            clip.end,
            [Sentence.of(sequence, clip.segment) for sequence in prompts],
        )
        for clip in progress.steps(clips, "scoring clips")
    ]
    return lambda: [answers() for answers in asked]


clip_rewards = at_once(ask_each)


def ask_segments(
    scorer: Scorer, pixels: Pixels, prompts: Sequence[Sequence[str]], clips: Sequence[Clip]
) -> Callable[[], dict[str, np.ndarray]]:
    """The global signal, the mean over the clips of `clip_rewards` (paper §3.4).

    Returns:
      () -> component -> float[P, T], or float[P, T + 1] with an anchor, which is the last.
    """
    answers = ask_each(scorer, pixels, prompts, clips)
    return lambda: mean_rewards(answers())


def mean_rewards(scores: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean of the rewards of clips; UsageError if they have not the same components."""
    for other in scores[1:]:
        if other.keys() != scores[0].keys():
            raise UsageError(
                f"the rewards of a prompt segment are {', '.join(other)}, those of the first"
                f" {', '.join(scores[0])}"
            )
    share = 1 / len(scores)
    return {name: share * sum((s[name] for s in scores), ZERO) for name in scores[0]}


segment_rewards = at_once(ask_segments)


def footage_of(windows: Windows, clips: Sequence[Clip], starts: Sequence[int]) -> Footage:
    """The frames of clips, each once, in `Pixels` with these windows."""
    rows: dict[int, int] = {}
    for clip in clips:
        here = frames_of(windows, clip.start, clip.end)
        rows |= zip(range(clip.start, clip.end), range(here.start, here.stop), strict=True)
    frames = sorted(rows)
    arrays = ([rows[frame] for frame in frames], frames, starts)
    return Footage(*(np.asarray(x, np.int32) for x in arrays))


def video_rewards(
    scorer: VideoScorer,
    pixels: Pixels,
    prompts: Sequence[Sequence[str]],
    clips: Sequence[Clip],
    starts: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Scores the frames of all clips of a video together.

    Args:
      scorer: see VideoScorer; called once.
      pixels: of single videos; at least the frames of the clips.
      prompts: P sequences of M sentences, for errors.
      clips: see `segment_clips`.
      starts: the pixel frames at which blocks begin.

    Returns:
      component -> float[P, T].

    Raises:
      NotFiniteError: a score is not finite; names component, prompt and trajectory.
    """
    p, t = pixels.videos.shape[:2]
    videos = pixels.videos.reshape(p * t, *pixels.videos.shape[2:])
    raw = scorer(videos, footage_of(pixels.windows, clips, starts))
    return {name: _finite(name, values, [s[0] for s in prompts], t) for name, values in raw.items()}


def check_weights(
    optimised: Collection[str] | None, watched: Collection[str] | None, weights: Mapping[str, float]
) -> None:
    """Checks that the weights fit the components of the scorers.

    Args:
      optimised: components of config.reward.scorer; None if they are not known yet.
      watched: components of config.eval.scorer; None if they are not known yet.
      weights: config.reward.weights.

    Raises:
      UsageError: no weight counts, a weight has no component, or a component is both optimised and
        watched.
    """
    if not any(weights.values()):
        known = f", {' or '.join(optimised)}" if optimised else ""
        raise UsageError(
            "no reward counts: add --config.reward.weights.COMPONENT=1 of"
            f" config.reward.scorer{known}"
        )
    if optimised is None:
        return
    for name, weight in weights.items():
        if weight and name not in optimised:
            raise UsageError(
                f"config.reward.weights.{name}={weight:g}: config.reward.scorer has only"
                f" {', '.join(optimised)}; add --config.reward.weights.{name}=0 to leave it out"
            )
    for name in watched or ():
        if name in optimised:
            raise UsageError(
                f"config.eval.scorer has a component {name!r} that config.reward.scorer has too;"
                " drop one"
            )


def composite(
    components: Mapping[str, Array | np.ndarray], weights: Mapping[str, float]
) -> np.ndarray:
    """The weighted sum of components float[P, T] (paper §3.4: VQ, MQ and TA).

    Raises:
      UsageError: see `check_weights`.
    """
    check_weights(components, (), weights)
    terms = [w * np.asarray(components[name]) for name, w in weights.items() if w]
    return sum(terms, ZERO)


def _cut(pixels: Pixels, start: int, end: int) -> Array:
    """Frames [start, end) of all trajectories, the anchor last: the only frames that are copied.

    If they are the same in all trajectories, they are those of one.
    """
    here = frames_of(pixels.windows, start, end)
    if pixels.anchor is None:
        return pixels.videos[:, :, here]
    chex.assert_equal_shape([pixels.videos[:, :1], pixels.anchor])
    anchor = pixels.anchor[:, :, here]
    if end <= pixels.fork:
        return anchor
    return jnp.concatenate([pixels.videos[:, :, here], anchor], axis=1)


def frames_of(windows: Windows, start: int, end: int) -> slice:
    """Where the frames [start, end) are in `Pixels` with these windows.

    Raises:
      ValueError: no window has them all.
    """
    before = 0
    for first, last in windows:
        if first <= start and end <= last:
            return slice(before + start - first, before + end - first)
        before += last - first
    raise ValueError(f"frames {start} to {end - 1} are read, but were not decoded")


def _as_scores(components: Mapping[str, Any], weights: Mapping[str, float]) -> Scores:
    """The scores of branches and anchor, from components float[P, G + 1] with the anchor last."""
    total: Any = composite(components, weights)
    return Scores(
        branches=total[:, :-1],
        anchor=total[:, -1],
        components={name: (x[:, :-1], x[:, -1]) for name, x in components.items()},
    )


def ask_rollout(
    scorer: Scorer,
    pixels: Pixels,
    prompts: Sequence[Sequence[str]],
    weights: Mapping[str, float],
    clips: Sequence[Clip],
) -> Callable[[], Scores]:
    """`ask_segments` of a group and its anchor, in one batch.

    Args:
      scorer: see Scorer.
      pixels: of the branches and the anchor.
      prompts: P sequences of M sentences.
      weights: component -> weight, see `composite`.
      clips: see `segment_clips`.
    """
    answers = ask_segments(scorer, pixels, prompts, clips)
    return lambda: _as_scores(answers(), weights)


def ask_window(
    scorer: Scorer,
    pixels: Pixels,
    sentences: Sequence[str],
    weights: Mapping[str, float],
    window: tuple[int, int],
) -> Callable[[], Scores]:
    """The released code's local signal: a score of the chunk that contains the fork.

    Args:
      scorer: see Scorer.
      pixels: of the branches and the anchor; at least the frames of the window.
      sentences: P sentences, those of the fork's prompt segment (`config.segment_of`).
      weights: component -> weight, see `composite`.
      window: [start, end) in pixel frames.

    Raises:
      UsageError: the window is empty.
    """
    start, end = window
    if not 0 <= start < end:
        raise UsageError(f"local window [{start}, {end}) has no pixel frame")
    answers = ask_clip(scorer, pixels, start, end, sentences)
    return lambda: _as_scores(answers(), weights)
