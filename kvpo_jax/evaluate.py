"""Held-out rewards of a run, or the scores of video files.

    python -m kvpo_jax.evaluate --workdir=runs/tiny-... [--config.eval.prompts=64 ...]
    python -m kvpo_jax.evaluate --videos=DIR --prompts=FILE --rewards=motion [--hpsv3=FILE] [--videoalign=FILE]

The first compares reference, online and EMA policy on the same prompts and noise. The second scores the videos of a
folder in the order of their names (2.mp4 before 10.mp4), one prompt sequence each, as training does: a clip in the
middle of every segment.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import config as config_lib
from kvpo_jax import heldout, report, rollout, sharding, train
from kvpo_jax.data import prompts
from kvpo_jax.decoder import Decoder
from kvpo_jax.rewards import composite, registry

SUFFIXES = (".mp4", ".webm", ".gif", ".mov")
OF_VIDEOS = ("prompts", "rewards", "hpsv3", "videoalign", "clip_frames", "output")  # flags that say nothing of a run


def evaluate_run(workdir: Path, arguments: Sequence[str]) -> None:
    """Prints the held-out table of a run's newest checkpoint."""
    # The run is looked at and not continued, so any field may differ here.
    config = config_lib.override(config_lib.load_saved(workdir / "config.json"), arguments)
    config_lib.check(config)
    config_lib.check_files(config)
    config_lib.use_compilation_cache()
    mesh = rollout.make_mesh(config)
    backbone = backbone_lib.load(config)
    like = train.init_state(config, train.make_optimiser(config.train), mesh)
    iteration, state = train.newest_state(workdir, like)
    params = backbone.load(jax.sharding.NamedSharding(mesh, sharding.REPLICATED))
    decoder = Decoder(backbone, mesh, config.video.block_frames)
    stages = rollout.build(config, mesh)
    results = {
        name: heldout.evaluate(config, backbone, mesh, stages, decoder, {"params": params, "lora": lora})
        for name, lora in (("reference", state.reference), ("online", state.lora), ("ema", state.ema))
    }
    rewards = {name: {"reward": result.reward, **result.components} for name, result in results.items()}
    print(f"iteration {iteration} of {workdir}\n{report.final_table(rewards)}", flush=True)


def score_video(
    scorer: composite.Scorer, video: np.ndarray, sentences: Sequence[str], clip_frames: int
) -> dict[str, float]:
    """Components of uint8[frames, h, w, 3], whose segments are equally long; `clip_frames` as in section reward."""
    frames, segments = len(video), len(sentences)
    pixels = jnp.asarray(video[None, None], jnp.float32) / 255
    switches = [round(m * frames / segments) for m in range(1, segments)]
    scores = composite.segment_rewards(scorer, pixels, [sentences], switches, clip_frames, lambda frame: frame)
    return {name: float(value[0, 0]) for name, value in scores.items()}


def score_videos(
    scorer: composite.Scorer, folder: Path, sequences: Sequence[prompts.Sequence], clip_frames: int, output: Path
) -> dict[str, dict[str, float]]:
    """Scores every video of `folder`, writes them to `output` as CSV and prints a table; file name -> components.

    A row is written as soon as it is known: after an error, those before it are in a file `output`.part.

    Raises:
      ValueError: if there are not as many prompt sequences as videos, or a file is no video. What a scorer raises has a
        note with the file.
    """
    parts = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder} has no videos ({', '.join(SUFFIXES)})")
    if len(files) != len(sequences):
        raise ValueError(f"{folder} has {len(files)} videos, but there are {len(sequences)} prompt sequences")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows, part = {}, output.with_name(f"{output.name}.part")
    with part.open("w", newline="") as file:
        for path, sequence in zip(sorted(sorted(files), key=parts), sequences, strict=True):
            try:
                video = iio.imread(path)
            except Exception as error:  # a decoder's errors have no common type
                raise ValueError(f"{path} cannot be read as a video: {error}") from error
            try:
                row = score_video(scorer, video, sequence.sentences, clip_frames)
            except Exception as error:
                error.add_note(str(path))
                raise
            if not rows:
                names, table = list(row), csv.DictWriter(file, ["video", *row])
                table.writeheader()
            rows[path.name] = row
            table.writerow({"video": path.name, **row})
            file.flush()
            print(f"{len(rows)}/{len(files)}  {path.name}", end="\r", file=sys.stderr, flush=True)
    part.replace(output)
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in names}
    width = max(map(len, rows))
    print(" " * width, *(f"{name:>12s}" for name in names))
    for name, row in rows.items():
        print(f"{name:{width}s}", *(f"{row[n]:12.4f}" for n in names))
    print(f"wrote {output}", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        if bool(given.workdir) == bool(given.videos):
            raise ValueError("give either --workdir or --videos")
        if given.workdir:
            if useless := [f"--{name}" for name in OF_VIDEOS if given[name].present]:
                raise ValueError(f"{useless[0]} is for --videos; --workdir is scored as --config.FIELD=VALUE says")
            evaluate_run(Path(given.workdir), arguments[1:])
        else:
            if arguments[1:]:
                raise ValueError(f"unexpected argument {arguments[1]!r}")
            if not given.prompts:
                raise ValueError("--videos needs --prompts, a file with one prompt sequence per video (docs/data.md)")
            for name in ("hpsv3", "videoalign"):
                if name in registry.names_of(given.rewards) and not given[name].value:
                    raise ValueError(
                        f"--rewards={name} needs --{name}=FILE, made by {config_lib.FILES[f'paths.{name}']}"
                    )
            config_lib.use_compilation_cache()
            if not registry.names_of(given.rewards):
                raise ValueError("--rewards names nothing; there are hpsv3, videoalign, motion, module:function")
            if "toy" in registry.names_of(given.rewards):
                raise ValueError("--rewards=toy scores the toy's own 8x8 pixels, which no video file has; try motion")
            scorer = registry.Rewards(given.rewards, {"hpsv3": given.hpsv3, "videoalign": given.videoalign})
            sequences = prompts.load(Path(given.prompts))
            output = Path(given.output or Path(given.videos) / "scores.csv")
            score_videos(scorer, Path(given.videos), sequences, given.clip_frames, output)
    except (ValueError, KeyError, OSError, FloatingPointError) as error:
        config_lib.explain(error)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "run directory")
    flags.DEFINE_string("videos", None, "folder of video files to score instead")
    flags.DEFINE_string("prompts", None, "file of their prompt sequences")
    flags.DEFINE_string("rewards", "motion", "names, separated by commas: hpsv3, videoalign, motion, module:function")
    flags.DEFINE_string("hpsv3", "", "converted HPSv3")
    flags.DEFINE_string("videoalign", "", "converted VideoAlign")
    flags.DEFINE_integer("clip_frames", 36, "frames scored of each segment, centred; 0 = all")
    flags.DEFINE_string("output", None, "CSV file; scores.csv beside the videos by default")
    app.run(main, flags_parser=config_lib.parse_flags)
