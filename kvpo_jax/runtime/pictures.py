"""Pictures of videos. Pixels are float[..., height, width, 3] in [0, 1] or uint8."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvpo_jax.runtime.atomic import replacing

PICTURED = 6  # held-out prompts in before_after.png: the first ones, not the best
MOVING = 168  # pixels of a video's width in a moving picture
WIDTH = 1200  # pixels of a strip, about; it shows as many frames as fit, 8 to 24
INK, FAINT, GOOD, BAD = "#202020", "#8a8a8a", "#1a7f37", "#b42318"


def before_after(
    prompts: Sequence[Sequence[str]],
    switch_frames: Sequence[int],
    frames: np.ndarray,
    clips: Mapping[str, np.ndarray],
    rewards: Mapping[str, np.ndarray],
) -> Image.Image:
    """Two strips per prompt sequence, made from the same noise by two policies.

    Args:
      prompts: n sequences of M prompts.
      switch_frames: the M - 1 frames of the videos at which the next prompt begins.
      frames: int[shown], the numbers of the frames that are shown, from `before_after_frames`.
      clips: "before" and "after" -> float[n, shown, height, width, 3] in [0, 1] or uint8.
      rewards: "before" and "after" -> float[n].
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
    return sheet


def moving(
    prompts: Sequence[Sequence[str]],
    switch_frames: Sequence[int],
    clips: Mapping[str, np.ndarray],
    rewards: Mapping[str, np.ndarray],
    fps: float,
    path: Path,
) -> None:
    """Writes a GIF that plays videos of two policies, made from the same noise.

    Args:
      prompts: n sequences of M prompts, a column each.
      switch_frames: the M - 1 frames at which the next prompt begins.
      clips: "before" and "after" -> [n, frames, height, width, 3], float in [0, 1] or uint8.
      rewards: "before" and "after" -> float[n].
      fps: frames per second.
      path: the GIF; its folder is made.
    """
    _, frames, height, width, _ = clips["before"].shape
    scale = MOVING / width
    size = MOVING, round(scale * height)
    font, small, left, gap, top = _font(17), _font(14), 92, 16, 46
    sheet = (left + len(prompts) * (MOVING + gap), top + 2 * (size[1] + 34))
    rows = (("before", top, FAINT), ("after", top + size[1] + 34, INK))

    def draw_frame(frame: int) -> Image.Image:
        picture = Image.new("RGB", sheet, "white")
        draw = ImageDraw.Draw(picture)
        segment = int(np.searchsorted(switch_frames, frame, side="right"))
        for name, y, colour in rows:
            draw.text((gap, y + size[1] // 2), name, colour, font, anchor="lm")
            for i, sentences in enumerate(prompts):
                x, reward = left + i * (MOVING + gap), rewards[name][i]
                said = "\n".join(_wrap(sentences[segment], small, MOVING))
                draw.multiline_text((x, top - 6), said, INK, small, "ld", spacing=3)
                video = _image(clips[name][i][frame])
                picture.paste(video.resize(size, _resampling(height)), (x, y))
                draw.text((x, y + size[1] + 14), f"reward {reward:.3f}", colour, small, "lm")
        return picture

    drawn = np.stack([np.asarray(draw_frame(frame)) for frame in range(frames)])
    with replacing(path) as temporary:
        temporary.write_bytes(gif(drawn, fps))


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


def gallery(captions: Sequence[str], videos: np.ndarray) -> np.ndarray:
    """Videos side by side, each below its caption.

    Args:
      captions: n of them.
      videos: [n, frames, h, w, 3].

    Returns:
      uint8[frames, height, width, 3].
    """
    tile, font, margin = _tile(videos[0, 0], 96), _font(13), 8
    wide = 2 * margin + max(tile.width, *(math.ceil(font.getlength(text)) for text in captions))
    high = tile.height + 20 + margin
    columns = min(len(captions), max(1, WIDTH // wide))
    places = [(i % columns * wide + margin, i // columns * high) for i in range(len(captions))]
    rows = -(-len(captions) // columns)
    blank = Image.new("RGB", (columns * wide, rows * high), "white")
    draw = ImageDraw.Draw(blank)
    for (x, y), text in zip(places, captions, strict=True):
        draw.text((x, y + 16), text, INK, font, anchor="lb")
    out = np.repeat(np.asarray(blank)[None], videos.shape[1], axis=0)
    for (x, y), video in zip(places, videos, strict=True):
        for frame, image in zip(out, video, strict=True):
            frame[y + 20 : y + 20 + tile.height, x : x + tile.width] = _tile(image, 96)
    return out


def gif(frames: np.ndarray, fps: float) -> bytes:
    """An animation of uint8[frames, h, w, 3] that repeats."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return out.getvalue()


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG; its folder is made."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def strip(frames: int, height: int, width: int) -> np.ndarray:
    """Numbers of the frames that a strip shows of a video of so many."""
    wide, _ = _tile_size(height, width)
    return spread(frames, max(8, min(24, WIDTH // wide)))


def spread(frames: int, most: int) -> np.ndarray:
    """Numbers of at most so many frames, evenly spread."""
    count = min(frames, most)
    return np.arange(count) * frames // count


def before_after_frames(
    frames: int, height: int, width: int, switch_frames: Sequence[int]
) -> np.ndarray:
    """Numbers of the frames that `before_after` shows: a strip, and the first ones of prompts."""
    return np.union1d(strip(frames, height, width), [0, *switch_frames])


def _tile_size(height: int, width: int, least: int = 48) -> tuple[int, int]:
    """Width and height of a frame in a picture: its height is about `least` to 96 pixels."""
    scale = least // height or min(1.0, 96 / height)
    return round(scale * width), round(scale * height)


def _tile(frame: np.ndarray, least: int = 48) -> Image.Image:
    """A frame as pictures show it: small ones with their pixels as squares, large ones smoothed."""
    image = _image(frame)
    return image.resize(_tile_size(image.height, image.width, least), _resampling(image.height))


def _image(frame: np.ndarray) -> Image.Image:
    if frame.dtype != np.uint8:
        frame = np.round(255 * np.clip(np.asarray(frame, np.float32), 0, 1)).astype(np.uint8)
    return Image.fromarray(np.asarray(frame))


def _resampling(height: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if height <= 48 else Image.Resampling.LANCZOS


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
