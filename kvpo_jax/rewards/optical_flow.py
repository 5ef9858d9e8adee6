"""How far the picture moves from frame to frame, by dense optical flow without a network.

A scorer of whole videos by scikit-image's TV-L1 (Zach, Pock and Bischof 2007). It takes 0.25 to 1
second of a CPU for each pair of frames of 480x832.
"""

from __future__ import annotations

import numpy as np

from kvpo_jax.errors import MissingPackageError
from kvpo_jax.rewards import stream
from kvpo_jax.rewards.composite import Footage
from kvpo_jax.runtime import progress
from kvpo_jax.types import Array

SIDE = 120  # pixels that the shorter side keeps at least, where frames are made smaller
UNIT = 256  # flow is in pixels of a frame whose shorter side has so many, as VBench's thresholds


def score(pixels: Array, footage: Footage) -> dict[str, Array | np.ndarray]:
    """Scores of videos, each float[n].

    flow: the mean length of the flow from a frame to the one that follows it, in 1/256 of the
      shorter side. More is no better; 0 is a still picture.
    flow_continuity: `stream.continuity` of these lengths; left out where nobody knows the blocks.

    Args:
      pixels: [n, m, h, w, 3], float in [0, 1] or uint8.
      footage: which frames of the video they are.

    Raises:
      UsageError: no two frames follow each other.
      MissingPackageError: scikit-image is not installed.
    """
    pairs = np.flatnonzero(footage.following())
    length = np.zeros((len(pairs), len(pixels)))
    for i, pair in enumerate(progress.steps(pairs, "optical flow")):
        before, after = (
            np.asarray(stream.luma(stream.frame_of(pixels, row, 1)))
            for row in footage.rows[pair : pair + 2].tolist()
        )
        length[i] = [mean_flow(a, b) for a, b in zip(before, after, strict=True)]
    continuity = stream.continuity(length, footage)
    return {"flow": length.mean(axis=0)} | (
        {"flow_continuity": continuity} if footage.starts.size else {}
    )


def mean_flow(before: np.ndarray, after: np.ndarray) -> float:
    """The mean length of the flow between two frames of luma float[h, w], see UNIT."""
    try:
        from skimage.registration import optical_flow_tvl1
        from skimage.transform import downscale_local_mean
    except ImportError as error:
        raise MissingPackageError(
            "the scorer flow needs scikit-image: pip install 'kvpo_jax[flow]'"
        ) from error
    side = min(before.shape)
    factor = max(side // SIDE, 1)
    rows, columns = (length // factor * factor for length in before.shape)
    small = (downscale_local_mean(x[:rows, :columns], (factor, factor)) for x in (before, after))
    return float(np.hypot(*optical_flow_tvl1(*small)).mean()) * factor * UNIT / side
