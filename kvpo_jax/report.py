"""What people look at: the metrics of every iteration, progress lines, pictures of videos, the table at the end.

Nothing here computes on a device. Pixels are float[..., height, width, 3] in [0, 1].
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kvpo_jax.config import write_json

# ---------------------------------------------------------------- metrics


class MetricWriter:
    """Appends to metrics.jsonl and to TensorBoard's event files in `workdir`.

    A continued run writes the iterations that it repeats again, so what an earlier process wrote of them goes first.

    Args:
      workdir: the run directory.
      first_iteration: the iteration that this process begins with, 0 for a new run.
    """

    def __init__(self, workdir: Path | str, first_iteration: int):
        from tensorboardX import SummaryWriter  # imports torch where that is installed

        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, first_iteration)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_iteration or None)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """One object of metrics.jsonl, and one scalar event each. What is not finite is null, as JSON has it."""
        values = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"iteration": iteration, **line}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)

    def write_videos(self, iteration: int, name: str, rows: Sequence[tuple[str, np.ndarray]]) -> None:
        """Labelled clips [frames, height, width, 3], as strips in one picture."""
        self._events.add_image(name, np.asarray(_sheet(rows)), iteration, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _truncate(path: Path, first_iteration: int) -> None:
    """Drops the lines from `first_iteration` on, and one that a kill has cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["iteration"] < first_iteration:
            kept.append(line)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


# Metric -> its column in a progress line.
COLUMNS = {
    "reward": "reward {:+.3f}",
    "reward_anchor": "anchor {:+.3f}",
    "win_rate": "win {:4.0%}",
    "log_ratio_std": "ratio ±{:.0e}",
    "kl": "KL {:.2e}",
    "clip_fraction": "clip {:4.0%}",
    "grad_norm": "grad {:.2e}",
}


class Progress:
    """Prints a line per iteration, with rates and the time left.

    Args:
      iterations: how many there are in all.
      clock: seconds, monotonic.
    """

    def __init__(self, iterations: int, clock=time.monotonic):
        self._iterations = iterations
        self._clock = clock
        self._times = [clock()]

    def line(self, iteration: int, metrics: Mapping[str, float]) -> str:
        """Prints and returns the line of the iteration just done, numbered from 0."""
        self._times.append(self._clock())
        # The first iteration of a process compiles; it is the measure only until there is another.
        recent = self._times[1:][-20:] if len(self._times) > 2 else self._times
        rate = (recent[-1] - recent[0]) / (len(recent) - 1)
        left = rate * (self._iterations - iteration - 1)
        columns = [text.format(metrics[name]) for name, text in COLUMNS.items() if name in metrics]
        took = self._times[-1] - self._times[-2]
        stages = {name.removeprefix("seconds_"): x for name, x in metrics.items() if name.startswith("seconds_")}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items() if seconds >= 0.05)
        elapsed = self._times[-1] - self._times[0]
        width = len(str(self._iterations))
        line = "  ".join(
            [
                f"{iteration + 1:{width}d}/{self._iterations}",
                *columns,
                f"{took:.1f} s" + (f" ({parts})" if parts else ""),
                f"{_duration(elapsed)} elapsed, {_duration(left)} left",
            ]
        )
        print(line, flush=True)
        return line


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ---------------------------------------------------------------- pictures

WIDTH = 1200  # pixels of a strip, about; it shows as many frames as fit, 8 to 24
INK, FAINT, GOOD, BAD = "#202020", "#8a8a8a", "#1a7f37", "#b42318"


def before_after(
    prompts: Sequence[Sequence[str]],
    switch_frames: Sequence[int],
    before: np.ndarray,
    after: np.ndarray,
    rewards_before: np.ndarray,
    rewards_after: np.ndarray,
    path: Path | str,
) -> None:
    """Writes a PNG with two strips per prompt sequence, made from the same noise by two policies.

    Args:
      prompts: n sequences of M prompts.
      switch_frames: the M - 1 frames of the clips at which the next prompt begins.
      before, after: float[n, frames, height, width, 3] in [0, 1] or uint8.
      rewards_before, rewards_after: float[n].
      path: the PNG; its folder is made.
    """
    begins = np.asarray([0, *switch_frames])
    frames = np.union1d(_shown(before[0]), begins)
    tile = _tile(before[0, 0])
    # A wider gap where the prompt switches.
    x = np.arange(len(frames)) * (tile.width + 1) + (np.searchsorted(begins, frames, side="right") - 1) * 8
    starts = np.searchsorted(frames, begins)
    ends = [*starts[1:], len(frames)]
    spans = [(int(x[a]), int(x[b - 1]) + tile.width) for a, b in zip(starts, ends, strict=True)]

    font, small, margin, left = _font(15), _font(13), 16, 150
    captions = [
        [_wrap(text, small, stop - start) for text, (start, stop) in zip(p, spans, strict=True)] for p in prompts
    ]
    text_height = 17 * max(len(lines) for caption in captions for lines in caption) + 8
    block = text_height + 2 * tile.height + 3 + 26
    sheet = Image.new("RGB", (left + spans[-1][1] + margin, 44 + len(prompts) * block), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 14), "Before and after, from the same prompts and noise; the numbers are rewards", INK, font)
    for i, caption in enumerate(captions):
        top = 44 + i * block
        for lines, (start, stop) in zip(caption, spans, strict=True):
            draw.multiline_text((left + start, top), "\n".join(lines), INK, small, spacing=3)
            draw.line([(left + start, top + text_height - 5), (left + stop - 1, top + text_height - 5)], FAINT)
        top += text_height
        gain = rewards_after[i] - rewards_before[i]
        for name, clip, reward, y, colour in (
            ("before", before[i], rewards_before[i], top, FAINT),
            ("after", after[i], rewards_after[i], top + tile.height + 3, INK),
        ):
            middle = y + tile.height // 2
            draw.text((margin, middle), name, colour, font, anchor="lm")
            draw.text((margin + 60, middle), f"{reward:.3f}", colour, font, anchor="lm")
            for frame, x_frame in zip(frames, x, strict=True):
                sheet.paste(_tile(clip[frame]), (left + int(x_frame), y))
        draw.text((margin + 60, middle + 17), f"{gain:+.3f}", GOOD if gain > 0 else BAD, small, anchor="lm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _sheet(rows: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """One labelled strip per row, with the numbers of the frames above."""
    frames, tile = _shown(rows[0][1]), _tile(rows[0][1][0])
    font, small, margin = _font(15), _font(11), 12
    left = 2 * margin + math.ceil(max(font.getlength(label) for label, _ in rows))
    size = (left + len(frames) * (tile.width + 1) + margin, 26 + len(rows) * (tile.height + 4) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(frames):
        x = left + column * (tile.width + 1)
        draw.text((x + tile.width // 2, 20), str(frame), FAINT, small, anchor="mb")
        for row, (_, clip) in enumerate(rows):
            sheet.paste(_tile(clip[frame]), (x, 26 + row * (tile.height + 4)))
    for row, (label, _) in enumerate(rows):
        draw.text((margin, 26 + row * (tile.height + 4) + tile.height // 2), label, INK, font, anchor="lm")
    return sheet


def _shown(clip: np.ndarray) -> np.ndarray:
    """Indices of the frames of a strip, evenly spread."""
    count = min(len(clip), max(8, min(24, WIDTH // _tile(clip[0]).width)))
    return np.arange(count) * len(clip) // count


def _tile(frame: np.ndarray) -> Image.Image:
    """A frame at about 48 to 96 pixels of height: small ones with their pixels as squares, large ones smoothed."""
    if frame.dtype != np.uint8:
        frame = np.round(255 * np.clip(np.asarray(frame, np.float32), 0, 1)).astype(np.uint8)
    image = Image.fromarray(np.asarray(frame))
    factor = 48 // image.height
    if factor:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    scale = min(1.0, 96 / image.height)
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
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
            fitting = (n for n in range(len(rest), 0, -1) if font.getlength(f"{rest[:n].rstrip()}...") <= width)
            return [*lines, f"{rest[: next(fitting, 0)].rstrip()}..."]
    return lines


# ---------------------------------------------------------------- held-out results

PICTURED = 6  # held-out prompts in before_after.png: the first ones, not the best


def finish(workdir: Path | str, config, backbone, reference, online, ema, seconds: Mapping[str, float]) -> dict:
    """Leaves summary.json and report/before_after.png in `workdir`, prints the final table, returns the summary.

    Args:
      workdir: the run directory.
      config: its configuration.
      backbone: see `backbone.Backbone`; tells the held-out prompts.
      reference, online, ema: `heldout.Heldout` of the three policies.
      seconds: what they were spent on, with "total".
    """
    path, shown = Path(workdir), range(min(PICTURED, len(reference.pixels)))
    rewards = {
        name: {"reward": result.reward, **result.components}
        for name, result in (("reference", reference), ("online", online), ("ema", ema))
    }
    summary = {
        "heldout": heldout_summary(reference.reward, online.reward, ema.reward),
        "components": {
            name: {column: float(np.mean(value)) for column, value in columns.items() if column != "reward"}
            for name, columns in rewards.items()
        },
        "seconds": dict(seconds),
    }
    before_after(
        [backbone.prompts("heldout", i) for i in shown],
        [backbone.to_pixel(frame) for frame in config.video.switch_frames],
        reference.pixels[: len(shown)],
        online.pixels[: len(shown)],
        reference.reward,
        online.reward,
        path / "report" / "before_after.png",
    )
    write_json(summary, path / "summary.json")
    print(f"\n{final_table(rewards, seconds)}\n\n{path / 'report' / 'before_after.png'} shows it", flush=True)
    return summary


def heldout_summary(reference: np.ndarray, online: np.ndarray, ema: np.ndarray) -> dict[str, object]:
    """The held-out result of a run, from the rewards float[n] of three policies for the same prompts and noise.

    `gain` is of online over reference, `gain_ci95` its paired 95 % Student-t interval over the prompts, and `win_rate`
    the share of prompts that online improves, a tie counting half.
    """
    gain, interval = paired_gain(reference, online)
    return {
        "reference": float(np.mean(reference)),
        "online": float(np.mean(online)),
        "ema": float(np.mean(ema)),
        "gain": gain,
        "gain_ci95": interval,
        "win_rate": win_rate(reference, online),
        "num_prompts": len(reference),
    }


def paired_gain(reference: np.ndarray, policy: np.ndarray) -> tuple[float, list[float]]:
    """Mean of policy - reference, float[n] each, and its 95 % Student-t interval [low, high]; n >= 2."""
    differences = np.asarray(policy, np.float64) - np.asarray(reference, np.float64)
    if differences.ndim != 1 or len(differences) < 2:
        raise ValueError(f"an interval needs the rewards of two prompts or more, not shape {differences.shape}")
    mean = float(np.mean(differences))
    half = t_quantile_975(len(differences) - 1) * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return mean, [mean - half, mean + half]


def win_rate(reference: np.ndarray, policy: np.ndarray) -> float:
    """Share of prompts, float[n] each, with policy above reference; a tie counts half."""
    return float(np.mean(0.5 * (np.sign(np.asarray(policy) - np.asarray(reference)) + 1)))


def t_quantile_975(freedom: int) -> float:
    """The t with P(|T| <= t) = 0.95 for Student's T with so many degrees of freedom."""
    low, high = 0.0, 13.0  # 12.706 with one degree of freedom, less with more
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _t_inside(middle, freedom) < 0.95 else (low, middle)
    return 0.5 * (low + high)


def _t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t) for whole degrees of freedom: Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def final_table(rewards: Mapping[str, Mapping[str, np.ndarray]], seconds: Mapping[str, float] | None = None) -> str:
    """The table that a run ends with.

    Args:
      rewards: policy -> column -> float[n], for the same n prompts and noise. The first policy is the one that the
        others are compared with, the first column the reward that the gain is of.
      seconds: what -> seconds; "total" is their frame. None leaves the line out.
    """
    policies, columns = list(rewards), list(rewards[next(iter(rewards))])
    first = rewards[policies[0]]
    rows = [["", *columns, f"gain over {policies[0]}", "95 % interval", "win rate"]]
    for policy in policies:
        row = [policy, *(f"{np.mean(rewards[policy][column]):.4f}" for column in columns)]
        if policy == policies[0]:
            rows.append([*row, "", "", ""])
            continue
        reward = rewards[policy][columns[0]]
        gain, (low, high) = paired_gain(first[columns[0]], reward)
        rows.append([*row, f"{gain:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{win_rate(first[columns[0]], reward):.0%}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    count = len(first[columns[0]])
    heading = f"held-out prompt sequences: {count}, with the same noise for every policy"
    if seconds is None:
        return "\n".join([heading, "", *lines])
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    return "\n".join([heading, "", *lines, "", f"seconds: {seconds['total']:.1f} in all ({parts})"])
