"""Video files. Pixels are uint8[frames, height, width, 3]."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np

from kvpo_jax.errors import UsageError, shortened
from kvpo_jax.runtime import file_kind
from kvpo_jax.runtime.atomic import keeping_part

SUFFIXES = (".mp4", ".webm", ".gif", ".mov")
SMALLEST = 128  # pixels; smaller videos are enlarged by a whole factor, or no player shows them
ENCODING = ("-pix_fmt", "yuv420p", "-crf", "10")  # of every mp4, by ffmpeg's x264
# imageio_ffmpeg would start ffmpeg with a fork, of which JAX warns.
os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")


@cache
def ffmpeg() -> str:
    """The ffmpeg program that imageio finds: its own, or that of IMAGEIO_FFMPEG_EXE.

    Raises:
      UsageError: there is none, or it does not start.
    """
    advice = "pip install imageio-ffmpeg brings one, and IMAGEIO_FFMPEG_EXE=FILE names another"
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        subprocess.run([program, "-version"], check=True, capture_output=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise UsageError(f"videos need ffmpeg: {error}; {advice}") from error
    except OSError as error:
        raise UsageError(f"ffmpeg at {program}: {error.strerror}; {advice}") from error
    return program


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """uint8[...] of pixels uint8 or in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels
    return np.clip(np.round(255 * pixels), 0, 255).astype(np.uint8)


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """uint8[frames, h, w, 3] of pixels uint8 or in [0, 1], by a whole factor no smaller than
    SMALLEST.
    """
    factor = -(-SMALLEST // min(pixels.shape[1:3]))
    pixels = as_bytes(pixels)
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else pixels


def reduced(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """What was `enlarge`d: the middle pixel of each square, uint8[frames, height, width, 3].

    Raises:
      UsageError: the pixels uint8[frames, h, w, 3] are no whole multiple of that size.
    """
    factor = pixels.shape[1] // height
    if pixels.shape[1:3] != (factor * height, factor * width):
        raise UsageError(
            f"its pictures have {pixels.shape[2]}x{pixels.shape[1]} pixels, expected"
            f" {width}x{height}, or these enlarged by a whole factor"
        )
    return pixels[:, factor // 2 :: factor, factor // 2 :: factor] if factor > 1 else pixels


def write(path: Path, pixels: np.ndarray, fps: float) -> None:
    """Writes an mp4 of pixels [frames, h, w, 3], uint8 or in [0, 1], enlarged if they are few.

    Raises:
      UsageError, OSError: see `writing`.
    """
    height, width = enlarge(pixels[:1]).shape[1:3]
    with writing(path, height, width, fps) as write_frame:
        for frame in pixels:
            write_frame(enlarge(frame[None])[0])


@contextmanager
def writing(
    path: Path, height: int, width: int, fps: float
) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes an mp4 frame by frame.

    Its frames go to `path`.part, which plays as far as it goes however the writing ends, and which
    takes the place of `path` once ffmpeg has ended well.

    Args:
      path: the file; its folder is made.
      height: pixels of a frame; an odd number is rounded up, as mp4 players need it.
      width: likewise.
      fps: frames per second.

    Yields:
      A function that writes a frame, uint8[height, width, 3].

    Raises:
      UsageError: ffmpeg cannot be started or cannot write the file; the message says why.
    """
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    even = f"scale={width + width % 2}:{height + height % 2}"
    made = [*ENCODING, "-vf", even]
    plays = ["-movflags", "frag_keyframe+empty_moov", "-f", "mp4"]
    command = [ffmpeg(), "-y", "-v", "error", *given, "-i", "-", *made, *plays]
    with keeping_part(path) as part, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, f"file:{part}"],
            stdin=subprocess.PIPE,
            stderr=said,
            process_group=0,  # so that Ctrl-C leaves it the time to end the file
        )
        pipe = process.stdin
        assert pipe is not None

        def write(frame: np.ndarray) -> None:
            try:
                pipe.write(np.ascontiguousarray(frame).data)
            except BrokenPipeError as error:
                raise _unwritten(process, said, path) from error

        try:
            yield write
        finally:
            try:
                pipe.close()
            except BrokenPipeError:  # its exit status says it, too
                pass
            process.wait()
        if process.returncode:
            raise _unwritten(process, said, path)


def _unwritten(process: subprocess.Popen, said: IO[bytes], path: Path) -> UsageError:
    """The error for a file that ffmpeg could not write."""
    process.wait()
    said.seek(0)
    text = said.read().decode(errors="replace")
    return UsageError(f"{path} cannot be written: {_reason(text, process.returncode)}")


def _reason(said: str, status: int) -> str:
    """Why ffmpeg failed: the first line that it has said, without the names of its parts."""
    lines = [re.sub(r"^(\[[^]]*\] )+", "", line).strip() for line in said.splitlines()]
    # What the system said is the reason of everything else.
    known = ("No space left on device", "Disk quota exceeded", "File too large")
    named = [reason for reason in known if reason in said]
    return next(iter([*named, *filter(None, lines)]), f"ffmpeg ended with status {status}")


def read(path: Path) -> np.ndarray:
    """The frames of a video file.

    Raises:
      UsageError: it is no video, or not a whole one; the message says what it is.
      OSError: it cannot be read.
    """
    file_kind.check(path, "a video", "video", "gif")
    arguments = ["-nostdin", "-v", "error", "-xerror", "-i", f"file:{path}"]
    done = subprocess.run(
        [ffmpeg(), *arguments, "-map", "0:v:0", "-f", "null", "-"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        reason = _reason(done.stderr, done.returncode)
        if "matches no streams" in reason:
            raise UsageError(f"{path} has no pictures, only sound")
        raise UsageError(f"{path} is not a whole video: {reason}; make or copy it again")
    try:
        video = iio.imread(path)
    except Exception as error:  # a decoder's errors have no common type
        raise UsageError(f"{path} cannot be read as a video: {error}") from error
    return video if video.ndim == 4 else video[None]


def preview(path: Path) -> bytes:
    """A small mp4 of a video: at most 320 pixels wide, for a page that has many of them.

    Raises:
      UsageError: it is not a whole video.
    """
    small = ["-vf", "scale=w='min(320,iw)':h=-2", "-pix_fmt", "yuv420p", "-crf", "30", "-an"]
    return _converted([path], [*small, "-movflags", "frag_keyframe+empty_moov", "-f", "mp4"])


def read_beside(paths: Sequence[Path], height: int) -> np.ndarray:
    """The frames of n videos of one size and length, in a process for all of them.

    Args:
      paths: the files.
      height: pixels to which they are brought.

    Returns:
      uint8[frames, n, height, width, 3].

    Raises:
      UsageError: one is not a whole video, or they differ in size.
    """
    scaled = [f"[{i}:v]scale=w=-2:h={height}:flags=area[v{i}]" for i in range(len(paths))]
    row = "".join(f"[v{i}]" for i in range(len(paths))) + f"hstack=inputs={len(paths)}"
    ppm = ["-f", "image2pipe", "-c:v", "ppm"]
    made = _converted(paths, ["-filter_complex", ";".join([*scaled, row]), *ppm])
    _, size, _, _ = made.split(b"\n", 3)
    width = int(size.split()[0])
    if width % len(paths):
        raise UsageError(f"{paths[0].parent}: its videos differ in size")
    frame = width * height * 3
    header = len(b"P6\n" + size + b"\n255\n")
    pixels = np.frombuffer(made, np.uint8).reshape(-1, header + frame)[:, header:]
    rows = pixels.reshape(len(pixels), height, len(paths), -1, 3)
    return np.moveaxis(rows, 2, 1)


def _converted(paths: Sequence[Path], arguments: Sequence[str]) -> bytes:
    """What ffmpeg makes of videos; UsageError if one of them is not whole."""
    inputs = [word for path in paths for word in ("-i", f"file:{path}")]
    strict = ["-nostdin", "-v", "error", "-xerror"]
    done = subprocess.run([ffmpeg(), *strict, *inputs, *arguments, "-"], capture_output=True)
    if done.returncode:
        for path in paths:
            read(path)  # names the one that is at fault
        reason = _reason(done.stderr.decode(errors="replace"), done.returncode)
        raise UsageError(f"{shortened(paths, 1)}: ffmpeg failed: {reason}")
    return done.stdout
