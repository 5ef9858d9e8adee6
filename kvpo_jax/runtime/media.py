"""Videos and pictures inside a page: data URIs, previews of large videos, differences of videos."""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from kvpo_jax.runtime import video

K = TypeVar("K", bound=Hashable)

LARGEST = 1_500_000  # bytes; of a larger video a page has a preview
TILES = 8  # pictures of a strip of differences of a square video, each of its share of the frames
TILE_HEIGHT = 64


def uri(kind: str, content: bytes) -> str:
    """The data URI of a file of this kind, such as "video/mp4"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def fitting(groups: Mapping[K, Sequence[Path]], room: int) -> dict[K, list[bytes]]:
    """The videos of the groups that fit `room` bytes together, whole groups in the given order.

    A large video is there as a preview.

    Raises:
      UsageError: a large video cannot be read.
      OSError: a file cannot be read.
    """
    out = {}
    for key, paths in groups.items():
        contents = [
            video.preview(path) if path.stat().st_size > LARGEST else path.read_bytes()
            for path in paths
        ]
        size = sum(map(len, contents))
        if size <= room:
            out[key], room = contents, room - size
    return out


def difference_strips(
    anchor: Path, branches: Sequence[Path]
) -> tuple[list[bytes], np.ndarray, float]:
    """A PNG per branch of how it differs from the anchor, along the video.

    Each of its pictures is the mean absolute difference over a share of the frames, in grey; white
    is the largest of the group.

    Returns:
      The PNGs; float[branches], the mean difference of each in levels of 255; the largest.

    Raises:
      UsageError: a file is not a whole video.
    """
    frames = video.read_beside([anchor, *branches], TILE_HEIGHT)
    differs = np.abs(frames[:, 1:].astype(np.int16) - frames[:, :1])
    height, width = differs.shape[2:4]
    shares = np.array_split(differs, min(max(4, TILES * height // width), len(differs)))
    tiles = np.stack([share.mean((0, -1)) for share in shares])  # [tiles, branches, h, w]
    most = float(tiles.max(initial=0))
    grey = np.round(tiles / (most or 1) * 255).astype(np.uint8)
    strips = [png(np.concatenate(list(grey[:, i]), axis=1)) for i in range(len(branches))]
    return strips, differs.mean((0, 2, 3, 4)), most


def png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8[h, w] or uint8[h, w, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()
