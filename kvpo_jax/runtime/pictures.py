"""Pictures of videos. Pixels are float[..., height, width, 3] in [0, 1] or uint8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvpo_jax.runtime.atomic import replacing

PICTURED = 6  # held-out prompts in before_after.png: the first ones, not the best
WIDTH = 1200  # pixels of a strip, about; it shows as many frames as fit, 8 to 24
INK, FAINT, GOOD, BAD = "#202020", "#8a8a8a", "#1a7f37", "#b42318"


def before_after(
    prompts: Sequence[Sequence[str]],
    switch_frames: Sequence[int],
    frames: np.ndarray,
    clips: Mapping[str, np.ndarray],
    rewards: Mapping[str, np.ndarray],
    path: Path,
) -> None:
    """Writes a PNG with two strips per prompt sequence, made from the same noise by two policies.

    Args:
      prompts: n sequences of M prompts.
      switch_frames: the M - 1 frames of the videos at which the next prompt begins.
      frames: int[shown], the numbers of the frames that are shown, from `before_after_frames`.
      clips: "before" and "after" -> float[n, shown, height, width, 3] in [0, 1] or uint8.
      rewards: "before" and "after" -> float[n].
      path: the PNG; its folder is made.
    """
    begins = np.asarray([0, *switch_frames])
    tile = _tile(clips["before"][0, 0])
    # A wider gap where the prompt switches.
    x = (
        np.arange(len(frames)) * (tile.width + 1)
        + (np.searchsorted(begins, frames, side="right") - 1) * 8
    )
    starts = np.searchsorted(frames, begins)
    ends = [*starts[1:], len(frames)]
    spans = [(int(x[a]), int(x[b - 1]) + tile.width) for a, b in zip(starts, ends, strict=True)]

    font, small, margin, left = _font(15), _font(13), 16, 150
    captions = [
        [_wrap(text, small, stop - start) for text, (start, stop) in zip(p, spans, strict=True)]
        for p in prompts
    ]
    text_height = 17 * max(len(lines) for caption in captions for lines in caption) + 8
    block = text_height + 2 * tile.height + 3 + 26
    sheet = Image.new("RGB", (left + spans[-1][1] + margin, 44 + len(prompts) * block), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (margin, 14),
        "Before and after, from the same prompts and noise; the numbers are rewards",
        INK,
        font,
    )
    for i, caption in enumerate(captions):
        top = 44 + i * block
        for lines, (start, stop) in zip(caption, spans, strict=True):
            draw.multiline_text((left + start, top), "\n".join(lines), INK, small, spacing=3)
            draw.line(
                [(left + start, top + text_height - 5), (left + stop - 1, top + text_height - 5)],
                FAINT,
            )
        top += text_height
        gain = rewards["after"][i] - rewards["before"][i]
        for name, y, colour in (("before", top, FAINT), ("after", top + tile.height + 3, INK)):
            clip, reward = clips[name][i], rewards[name][i]
            middle = y + tile.height // 2
            draw.text((margin, middle), name, colour, font, anchor="lm")
            draw.text((margin + 60, middle), f"{reward:.3f}", colour, font, anchor="lm")
            for frame, x_frame in zip(clip, x, strict=True):
                sheet.paste(_tile(frame), (left + int(x_frame), y))
        draw.text(
            (margin + 60, middle + 17),
            f"{gain:+.3f}",
            GOOD if gain > 0 else BAD,
            small,
            anchor="lm",
        )
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def sheet(rows: Sequence[tuple[str, np.ndarray]], frames: np.ndarray) -> Image.Image:
    """One labelled strip per row, with the numbers of the frames, int[shown], above."""
    tile = _tile(rows[0][1][0])
    font, small, margin = _font(15), _font(11), 12
    left = 2 * margin + math.ceil(max(font.getlength(label) for label, _ in rows))
    size = (
        left + len(frames) * (tile.width + 1) + margin,
        26 + len(rows) * (tile.height + 4) + margin,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(frames):
        x = left + column * (tile.width + 1)
        draw.text((x + tile.width // 2, 20), str(frame), FAINT, small, anchor="mb")
        for row, (_, clip) in enumerate(rows):
            sheet.paste(_tile(clip[column]), (x, 26 + row * (tile.height + 4)))
    for row, (label, _) in enumerate(rows):
        draw.text(
            (margin, 26 + row * (tile.height + 4) + tile.height // 2), label, INK, font, anchor="lm"
        )
    return sheet


def strip(frames: int, height: int, width: int) -> np.ndarray:
    """Numbers of the frames that a strip shows of a video of so many, evenly spread."""
    wide, _ = _tile_size(height, width)
    count = min(frames, max(8, min(24, WIDTH // wide)))
    return np.arange(count) * frames // count


def before_after_frames(
    frames: int, height: int, width: int, switch_frames: Sequence[int]
) -> np.ndarray:
    """Numbers of the frames that `before_after` shows: a strip, and the first ones of prompts."""
    return np.union1d(strip(frames, height, width), [0, *switch_frames])


def _tile_size(height: int, width: int) -> tuple[int, int]:
    """Width and height of a frame in a picture: its height is about 48 to 96 pixels."""
    scale = 48 // height or min(1.0, 96 / height)
    return round(scale * width), round(scale * height)


def _tile(frame: np.ndarray) -> Image.Image:
    """A frame as pictures show it: small ones with their pixels as squares, large ones smoothed."""
    if frame.dtype != np.uint8:
        frame = np.round(255 * np.clip(np.asarray(frame, np.float32), 0, 1)).astype(np.uint8)
    image = Image.fromarray(np.asarray(frame))
    small = image.height <= 48
    resampling = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.resize(_tile_size(image.height, image.width), resampling)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """At most two lines of `width` pixels, with "..." where the text goes on."""
    lines, words = [""], text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == 1 and lines[0]:
            lines.append(word)
        else:
            rest = " ".join([lines.pop(), *words[i:]]).strip()
            fitting = (
                n
                for n in range(len(rest), 0, -1)
                if font.getlength(f"{rest[:n].rstrip()}...") <= width
            )
            return [*lines, f"{rest[: next(fitting, 0)].rstrip()}..."]
    return lines
