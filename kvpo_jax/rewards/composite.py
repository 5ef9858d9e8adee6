"""From videos to the scores of a group: which clips are scored with which sentence, and how components are weighted.

A scorer is any function (pixels float[n, frames, h, w, 3] in [0, 1], n prompts) -> {component: float[n]}. The global
signal scores one clip per prompt segment and averages over the segments (paper §3.4; the released code's clips are 36
frames centred in each segment). The local signal of the released code scores the chunk that holds the fork.

Everything above `score_clips` is arithmetic on Python ints. Windows are half open, [start, end).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import chex
import jax.numpy as jnp
import numpy as np

from kvpo_jax.types import Array, Scores

Scorer = Callable[[Array, Sequence[str]], Mapping[str, Array]]


# ---------------------------------------------------------------- frames, segments, clips


@dataclasses.dataclass(frozen=True)
class Clip:
    """Pixel frames [start, end), scored with the sentence of a prompt segment."""

    segment: int
    start: int
    end: int


def latent_to_pixel(frame: int, stride: int = 4) -> int:
    """First pixel frame of a latent frame of the Wan VAE: latent frame 0 is one pixel frame, every other `stride`."""
    return 1 + stride * (frame - 1) if frame > 0 else 0


def clip_window(center: int, total: int, clip_len: int) -> tuple[int, int]:
    """[start, end) of `clip_len` of `total` frames, centred where the borders allow; all where there are fewer."""
    end = min(max(center - clip_len // 2, 0) + clip_len, total)
    return max(end - clip_len, 0), end


def segment_clips(
    total: int, segments: int, switch_frames: Sequence[int], clip_frames: int, to_pixel: Callable[[int], int]
) -> list[Clip]:
    """One clip in the middle of each prompt segment of a video.

    Args:
      total: pixel frames of the video.
      segments: M; switches beyond the first M - 1 are not used, fewer are a ValueError.
      switch_frames: ascending latent frames at which the next segment begins.
      clip_frames: pixel frames per clip, which may reach over a short segment's ends; 0 is the segment itself.
      to_pixel: latent frame -> pixel frame.

    Returns:
      Clips in order. A segment of fewer than two frames, or behind the video's end, has none.
    """
    if len(switch_frames) < segments - 1:
        raise ValueError(f"{segments} prompts need {segments - 1} switch frames, got {tuple(switch_frames)}")
    bounds = (0, *(min(to_pixel(f), total) for f in switch_frames[: segments - 1]), total)
    return [
        Clip(m, *(clip_window((start + end) // 2, total, clip_frames) if clip_frames else (start, end)))
        for m, (start, end) in enumerate(itertools.pairwise(bounds))
        if end - start >= 2
    ]


# ---------------------------------------------------------------- scores


def score_clips(scorer: Scorer, clips: Array, sentences: Sequence[str]) -> dict[str, Array]:
    """Scores one clip of every trajectory in a single call of the scorer.

    Args:
      scorer: see the module.
      clips: float[P, T, frames, h, w, 3] in [0, 1] or uint8; the scorer gets floats.
      sentences: P, one per prompt sequence.

    Returns:
      component -> float[P, T].

    Raises:
      FloatingPointError: a score is not finite; names component, prompt and trajectory.
    """
    p, t = clips.shape[:2]
    chex.assert_shape(clips, (p, t, None, None, None, 3))
    chex.assert_equal(len(sentences), p)
    if clips.dtype == np.uint8:
        clips = jnp.asarray(clips, jnp.float32) / 255
    raw = scorer(clips.reshape(p * t, *clips.shape[2:]), [s for s in sentences for _ in range(t)])
    scores = {}
    for name, values in raw.items():
        chex.assert_shape(values, (p * t,))
        scores[name] = jnp.asarray(values, jnp.float32).reshape(p, t)
        bad = np.argwhere(~np.isfinite(scores[name]))
        if len(bad):
            prompt, trajectory = bad[0]
            raise FloatingPointError(
                f"reward {name} is {scores[name][prompt, trajectory]} for prompt {prompt} ({sentences[prompt]!r}), "
                f"trajectory {trajectory} of {t} (branches first, then the anchor)"
            )
    return scores


def segment_rewards(
    scorer: Scorer,
    pixels: Array,
    prompts: Sequence[Sequence[str]],
    switch_frames: Sequence[int],
    clip_frames: int,
    to_pixel: Callable[[int], int],
) -> dict[str, Array]:
    """The global signal: the mean over prompt segments of each segment's clip, scored with the segment's sentence.

    Args:
      scorer: see the module; called once per segment, with all P * T clips.
      pixels: float[P, T, frames, h, w, 3] in [0, 1] or uint8.
      prompts: P sequences of M sentences.
      switch_frames, clip_frames, to_pixel: see `segment_clips`.

    Returns:
      component -> float[P, T].
    """
    segments = len(prompts[0])
    if any(len(sequence) != segments for sequence in prompts):
        raise ValueError(f"prompt sequences of different lengths: {[len(sequence) for sequence in prompts]}")
    clips = segment_clips(pixels.shape[2], segments, switch_frames, clip_frames, to_pixel)
    if not clips:
        raise ValueError(f"no prompt segment of {pixels.shape[2]} pixel frames has two frames to score")
    scores = [
        score_clips(scorer, pixels[:, :, clip.start : clip.end], [sequence[clip.segment] for sequence in prompts])
        for clip in clips
    ]
    return {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}


def check(optimised: Collection[str] | None, watched: Collection[str] | None, weights: Mapping[str, float]) -> None:
    """Raises a ValueError for a weight without a component, and for a component that is optimised and watched too.

    Args:
      optimised: components of config.reward.scorer; None if they are not known yet.
      watched: components of config.eval.scorer, likewise.
      weights: config.reward.weights.
    """
    if not any(weights.values()):
        known = f", {' or '.join(optimised)}" if optimised else ""
        raise ValueError(f"no reward counts: add --config.reward.weights.COMPONENT=1 of config.reward.scorer{known}")
    if optimised is None:
        return
    for name, weight in weights.items():
        if weight and name not in optimised:
            raise ValueError(
                f"config.reward.weights.{name}={weight:g}: config.reward.scorer has only {', '.join(optimised)}; "
                f"add --config.reward.weights.{name}=0 to leave it out"
            )
    for name in watched or ():
        if name in optimised:
            raise ValueError(f"config.eval.scorer has a component {name!r} that config.reward.scorer has too; drop one")


def composite(components: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """The weighted sum of components float[P, T] (paper §3.4: VQ, MQ and TA); ValueError as `check`."""
    check(components, (), weights)
    return sum(weight * components[name] for name, weight in weights.items() if weight)


def _trajectories(branches: Array, anchor: Array) -> Array:
    """float[P, G + 1, ...]: the branches, then the anchor."""
    chex.assert_equal_shape([branches[:, 0], anchor])
    return jnp.concatenate([branches, anchor[:, None]], axis=1)


def _as_scores(components: Mapping[str, Array], weights: Mapping[str, float]) -> Scores:
    total = composite(components, weights)
    return Scores(total[:, :-1], total[:, -1], {name: (s[:, :-1], s[:, -1]) for name, s in components.items()})


def score_rollout(
    scorer: Scorer,
    branches: Array,
    anchor: Array,
    prompts: Sequence[Sequence[str]],
    weights: Mapping[str, float],
    switch_frames: Sequence[int],
    clip_frames: int,
    to_pixel: Callable[[int], int],
) -> Scores:
    """`segment_rewards` of a group and its anchor, in one batch.

    Args:
      branches: pixels [P, G, frames, h, w, 3], as in `score_clips`.
      anchor: pixels [P, frames, h, w, 3].
      weights: component -> weight, see `composite`.
      scorer, prompts, switch_frames, clip_frames, to_pixel: see `segment_rewards`.
    """
    pixels = _trajectories(branches, anchor)
    return _as_scores(segment_rewards(scorer, pixels, prompts, switch_frames, clip_frames, to_pixel), weights)


def score_window(
    scorer: Scorer,
    branches: Array,
    anchor: Array,
    sentences: Sequence[str],
    weights: Mapping[str, float],
    window: tuple[int, int],
) -> Scores:
    """The released code's local signal: one window of pixel frames, the chunk that holds the fork.

    Frames of the window before the fork are the same in all trajectories and are scored with the rest.

    Args:
      branches: pixels [P, G, frames, h, w, 3], as in `score_clips`.
      anchor: pixels [P, frames, h, w, 3].
      sentences: P, of the segment that holds the fork (`rollout.segment_of`).
      weights: component -> weight, see `composite`.
      window: [start, end) in pixel frames.
      scorer: see the module.

    Raises:
      ValueError: the window is empty or does not lie in the video.
    """
    start, end = window
    if not 0 <= start < end <= anchor.shape[1]:
        raise ValueError(f"local window [{start}, {end}) is not within the {anchor.shape[1]} pixel frames of the video")
    clips = _trajectories(branches[:, :, start:end], anchor[:, start:end])
    return _as_scores(score_clips(scorer, clips, sentences), weights)
