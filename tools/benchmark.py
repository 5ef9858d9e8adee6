"""Measures how fast the stages of an iteration are, next to the machine's peak, and their memory.

    python tools/benchmark.py --preset=golden_perf --threads=1 --json=benchmark.json
    python tools/benchmark.py --preset=longlive --rows=denoise_forward,window_rollout_G \\
        --config.rollout.branches=4

It runs on one device, with random weights and for one prompt: speed does not depend on the numbers.
Every row is the package's own code, on a state that its own rollout has made:

    denoise_forward          one solver step of one block of one trajectory, at the pivot
    window_rollout_1         the perturbed window of one branch: an empty page, then W blocks of S
                             solver steps and a cache write
    window_rollout_G         the same for G branches at once, without the anchor
    replay_forward           the energies of G branches (train.energies)
    replay_forward_backward  the same and the gradient of the loss in LoRA (programs.replay)
    iteration                text, prefix, anchor and branches to the end of the video, reference
                             energies and update (train.explore, remember and learn), but neither
                             decoder nor reward, which are not the generator's

The preset golden_perf is the work that tests/golden/perf.json describes, with the release's
semantics: there each branch replays what it wrote itself, in 24 passes. With
--config.replay.context=anchor it is the paper's replay of 20 passes.

FLOPs are those of the matrix products that a row needs, counted by formula; products that are
recomputed or masked do not count. On a CPU, `cpu s` (processor time) shows whether the machine was
busy: it was not if `cpu s` over the threads is close to `median s`.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from random_run import Preset, RandomRun, measure

from kvpo_jax import train
from kvpo_jax.algorithm import block as block_lib
from kvpo_jax.algorithm import flow, keys, kv_cache, routing
from kvpo_jax.backbone import pixel_shape
from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.models.wan import Wan, WanConfig
from kvpo_jax.runtime import command, progress
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.runtime.config import always_on_policy, recorded_blocks, wan_config
from kvpo_jax.state import init_state
from kvpo_jax.types import PyTree

ROWS = (
    "denoise_forward",
    "window_rollout_1",
    "window_rollout_G",
    "replay_forward",
    "replay_forward_backward",
    "iteration",
)


PRESETS = {
    "golden_perf": Preset(
        "configs/tiny.py:release",
        {
            "model.dim": 256,
            "model.ffn_dim": 1024,
            "model.num_heads": 4,
            "model.num_layers": 6,
            "model.freq_dim": 256,
            "model.text_dim": 256,
            "model.text_len": 64,
            "model.channels": 16,
            "model.remat": "products",
            "lora.rank": 32,
            "lora.alpha": 32.0,  # an eighth of the width; LongLive's adapter is a sixth of its
            "video.height": 16,
            "video.width": 16,
            "video.blocks": 13,
            "video.switch_frames": (),
            "rollout.branches": 8,
            "rollout.window_blocks": 5,
            "replay.blocks": 5,
            "replay.chunk": 5,
        },
        pivot=8,
    ),
    "tiny": Preset("configs/tiny.py", {}, pivot=5),
    "longlive": Preset("configs/longlive.py", {}, pivot=25),
}
# Dense bfloat16 products per second on the data sheet, by a part of jax's device_kind.
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

# ---------------------------------------------------------------- counted work


def forward_flops(cfg: WanConfig, tokens: int, frames: int, past: int) -> int:
    """FLOPs of the matrix products of one pass: `frames` frames attend also to `past` others.

    A product [m, k] x [k, n] counts as 2 m k n. `tokens` is N. Norms, softmax, rotations and gelu
    are left out: they are a percent. So is LoRA in float32, where it is added to the kernels.
    """
    q, k, d = frames * tokens, (frames + past) * tokens, cfg.dim
    patch = cfg.channels * cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    linears = 6 * d * d + 2 * d * cfg.ffn_dim  # self q, k, v, o; cross q, o; MLP
    lora = cfg.lora_rank * (6 * (d + d) + 2 * (d + cfg.ffn_dim)) if cfg.dtype != "float32" else 0
    attention = 2 * d * (k + cfg.text_len)  # logits, and the sum that they weight
    time_mlp = cfg.freq_dim * d + d * d + 6 * d * d
    return 2 * (cfg.num_layers * q * (linears + lora + attention) + 2 * q * d * patch + time_mlp)


def backward_flops(cfg: WanConfig, tokens: int, frames: int, past: int, text_gradient: bool) -> int:
    """FLOPs of the backward pass that follows `forward_flops`, with gradients of LoRA alone.

    Linears carry the gradient to their input and none to their weights; LoRA does both. The past
    has no gradient. The keys and values of the text have one if `text_gradient`; the layers before
    them are a thousandth and left out.
    """
    q, k, d = frames * tokens, (frames + past) * tokens, cfg.dim
    patch = cfg.channels * cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    linears = 6 * d * d + 2 * d * cfg.ffn_dim
    lora = 2 * cfg.lora_rank * (6 * (d + d) + 2 * (d + cfg.ffn_dim))
    # Of probabilities and queries over all keys, of keys and values over those that have a
    # gradient.
    attention = 2 * d * (k + q + cfg.text_len * (2 if text_gradient else 1))
    return 2 * (cfg.num_layers * q * (linears + lora + attention) + q * d * patch)


def text_flops(cfg: WanConfig) -> int:
    """FLOPs of the text keys and values of one sentence."""
    linears = cfg.text_dim * cfg.dim + cfg.dim * cfg.dim
    per_layer = 2 * (cfg.dim * cfg.dim + cfg.lora_rank * 2 * cfg.dim)
    return 2 * cfg.text_len * (linears + cfg.num_layers * per_layer)


@dataclasses.dataclass(frozen=True)
class Work:
    """Matrix products, and the tokens that went through the transformer's forward passes."""

    flops: int = 0
    tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.tokens + other.tokens)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.tokens * times)


def counted(config: ml_collections.ConfigDict, pivot: int) -> dict[str, Work]:
    """Row -> its work, with the first perturbed block `pivot`."""
    cfg, window, replay, video = wan_config(config), config.window, config.replay, config.video
    tokens, segments = cfg.tokens_per_frame(video.height, video.width), len(video.switch_frames) + 1
    branches, steps = config.rollout.branches, len(config.sampler.steps)
    own_text = replay.text == "policy"
    text = Work(text_flops(cfg)) * segments

    def past(block: int) -> int:
        """Frames that a block attends to; a routed context has as many as a deployment window."""
        return min(block * video.block_frames, window.sink + window.past)

    def one_pass(frames: int, past: int) -> Work:
        return Work(forward_flops(cfg, tokens, frames, past), frames * tokens)

    def forward(block: int) -> Work:
        return one_pass(video.block_frames, past(block))

    recache = one_pass(window.recache_frames, window.sink)

    def switches(block: int) -> bool:
        return block * video.block_frames in video.switch_frames

    def blocks(first: int, last: int) -> Work:
        """Blocks first ... last - 1 of one trajectory, and the recaches between them."""
        out = Work()
        for block in range(first, last):
            out += forward(block) * (steps + 1) + recache * (block > first and switches(block))
        return out

    def replayed(backward: bool) -> Work:
        out, recorded = Work(), range(pivot, pivot + recorded_blocks(config))
        shared = replay.context == "anchor"  # the first step, by all branches
        learned = min(replay.grad_steps, steps)
        for block in recorded:
            out += forward(block) * (branches * (steps - shared) + shared)
            if backward:
                of_branch = learned - shared
                if shared and block == pivot and always_on_policy(config):  # the settled steps
                    of_branch = min(of_branch, max(config.rollout.perturbed_steps, 1) - shared)
                flops = backward_flops(cfg, tokens, video.block_frames, past(block), own_text)
                out += Work(flops) * (branches * of_branch + shared)
                out += forward(block) * (shared and replay.chunk > 0)
            if replay.context == "self_rolled" and block != recorded[-1]:
                # The cache write, and the last step without its gradient where it has one.
                out += forward(block) * (branches * (2 if learned == steps else 1))
        return out + text * own_text

    # The recache of a switch at the pivot is made once, before the fork.
    trajectories = blocks(pivot, video.blocks) * (1 + branches)
    whole = text + blocks(0, pivot) + recache * switches(pivot) + trajectories
    perturbed = blocks(pivot, pivot + config.rollout.window_blocks)
    return {
        "denoise_forward": forward(pivot),
        "window_rollout_1": perturbed,
        "window_rollout_G": perturbed * branches,
        "replay_forward": replayed(backward=False),
        "replay_forward_backward": replayed(backward=True),
        "iteration": whole + replayed(backward=False) + replayed(backward=True),
    }


# ---------------------------------------------------------------- the rows


class Bench(RandomRun):
    """The functions to time, each made when it is asked for.

    The docstring of the module describes the rows.
    """

    @cached_property
    def block_shape(self) -> tuple[int, int, int, int]:
        """[F, Y, X, C]."""
        video = self.run.config.video
        return video.block_frames, video.height, video.width, self.run.config.model.channels

    @cached_property
    def spoken(self) -> PyTree:
        """TextKV of the segment that the pivot is in."""
        return jax.tree.map(lambda x: x[:, :, self.segment], self.text)

    def denoise_forward(self) -> Callable[[], Any]:
        window, model = routing.window(self.run.config.window), Wan(wan_config(self.run.config))

        @jax.jit
        def forward(variables, text, history, x, start):
            frames = routing.deployment_frames(window, start)
            context = kv_cache.read(frames[None, None], history)
            return model.apply(variables, x, jnp.ones(1), text, context, start[None])[0]

        x = jax.random.normal(self.key, (1, *self.block_shape))
        start = jnp.asarray(self.fork_frame, jnp.int32)
        return lambda: forward(self.variables, self.spoken, self.history, x, start)

    def window_rollout(self, branches: int) -> Callable[[], Any]:
        config = self.run.config
        window, schedule = routing.window(config.window), flow.schedule(config.sampler)
        model, steps = Wan(wan_config(config)), len(config.sampler.steps)

        @jax.jit
        def fork(history):
            page = kv_cache.trajectory(self.run.programs.fork(history), 0)
            return kv_cache.repeat(page, branches)

        @partial(jax.jit, donate_argnums=3)
        def block(variables, text, history, page, routed_frames, noise, start):
            number, every = start // config.video.block_frames, np.ones(branches, bool)
            perturbed = routing.perturbed_passes(
                config.rollout, steps, every, number, self.window_blocks
            )
            frames = routing.context_frames(window, routed_frames, start, perturbed)
            noise = keys.block_noise(noise, start, (steps + 1, *self.block_shape))
            network = partial(model.apply, variables)
            return block_lib.generate_block(
                network, schedule, text, history, page, frames, noise, start
            )

        def run():
            page, records = fork(self.history), []
            for number in range(*self.window_blocks):
                record, page = block(
                    self.variables,
                    self.spoken,
                    self.history,
                    page,
                    self.routed_frames[:, :branches],
                    self.noise,
                    number * config.video.block_frames,
                )
                records.append(record)
            return records, page

        return run

    def replay_forward(self) -> Callable[[], Any]:
        experience = self.experience
        return lambda: train.energies(self.run, self.lora, experience)

    def replay_forward_backward(self) -> Callable[[], Any]:
        experience, params, wanted = self.experience, self.run.params, np.asarray(True)
        return lambda: self.run.programs.replay(self.lora, params, experience, wanted)

    def iteration(self) -> Callable[[], Any]:
        """On policy, as `train.improve`."""
        state = init_state(self.run.config, self.run.mesh, self.lora)
        frames, _, _ = pixel_shape(self.run.config, self.run.backbone)
        whole = ((0, frames),)  # as the release, which makes every block

        def run():
            rolled = train.explore(self.run, state.old, self.batch, 0, self.pivot, whole)
            experience = train.remember(
                self.run, state, rolled, self.batch, self.judged, on_policy=True
            )
            total, _ = train.learn(self.run, state.lora, experience, self.batch.sentences, None)
            return self.run.programs.apply(state, total)

        return run

    def row(self, name: str) -> Callable[[], Any]:
        """The function of a row."""
        makers: dict[str, Callable[[], Callable[[], Any]]] = {
            "denoise_forward": self.denoise_forward,
            "window_rollout_1": partial(self.window_rollout, 1),
            "window_rollout_G": partial(self.window_rollout, self.run.config.rollout.branches),
            "replay_forward": self.replay_forward,
            "replay_forward_backward": self.replay_forward_backward,
            "iteration": self.iteration,
        }
        return makers[name]()


# ---------------------------------------------------------------- measuring


def limit_threads(threads: int) -> None:
    """Keeps this process on so many cores.

    It must be called before jax looks for devices: XLA's pool gets a thread for each core.
    """
    if threads:
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise UsageError(
                f"--threads={threads}, but this process may use {len(cores)} cores only"
            )
        os.sched_setaffinity(0, cores[-threads:])


def matrix_peak(dtype: str) -> float:
    """The best measured FLOP/s of a square matrix product."""
    best = 0.0
    for n in (512, 1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        product = jax.jit(jnp.matmul)
        best = max(best, 2 * n**3 / min(measure(partial(product, a, a), 10)[0]))
    return best


def hardware(dtype: str) -> dict[str, Any]:
    """What the figures depend on besides the config."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        kind = models[0] if models else platform.processor()
    sheet = [peak for name, peak in DATA_SHEET.items() if name in kind]
    return {
        "device": kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "dtype": dtype,
        "matrix_peak_flops_per_s": matrix_peak(dtype),
        "data_sheet_flops_per_s": sheet[0] if sheet and dtype == "bfloat16" else None,
    }


def measure_row(name: str, run: Callable[[], Any], work: Work, repeats: int) -> dict[str, Any]:
    """A row as it goes into the JSON file, but for the share of the machine's peak."""
    seconds, processor, memory = measure(run, repeats)
    median = float(np.median(seconds))
    return {
        "name": name,
        "median_s": median,
        "min_s": min(seconds),
        "n": repeats,
        "flops": work.flops,
        "peak_memory_bytes": memory,
        "max_s": max(seconds),
        "cpu_s": processor,
        "tokens_per_s": work.tokens / median,
        "flops_per_s": work.flops / median,
    }


def benchmark(
    config: ml_collections.ConfigDict, pivot: int, names: Sequence[str], repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures and prints (hardware, rows), the rows as they go into the JSON file."""
    machine = hardware(config.model.dtype)
    known = [(name, value) for name, value in machine.items() if value is not None]
    progress.table("", ("hardware", "value"), known)
    print(flush=True)
    peak = machine["data_sheet_flops_per_s"] or machine["matrix_peak_flops_per_s"]
    bench, work, rows = Bench(config, pivot), counted(config, pivot), []
    with progress.bar("benchmark", len(names)) as advance:
        for name in names:
            row = measure_row(name, bench.row(name), work[name], repeats)
            rows.append({**row, "share_of_peak": row["flops_per_s"] / peak})
            advance(1, f"benchmark: {name}")
    cells = [_cells(row) for row in rows]
    progress.table("", list(cells[0]), [list(row.values()) for row in cells])
    return machine, rows


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Column -> what is printed there for a row."""
    spread = (row["max_s"] - row["min_s"]) / row["median_s"]
    return {
        "row": row["name"],
        "median s": f"{row['median_s']:.4f}",
        "min s": f"{row['min_s']:.4f}",
        "spread": f"{spread:.0%}",
        "cpu s": f"{row['cpu_s']:.4f}",
        "peak MB": f"{row['peak_memory_bytes'] / 1e6:.0f}",
        "tokens/s": f"{row['tokens_per_s']:.0f}",
        "GFLOP": f"{row['flops'] / 1e9:.3f}",
        "GFLOP/s": f"{row['flops_per_s'] / 1e9:.1f}",
        "of peak": f"{row['share_of_peak']:.1%}",
    }


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    preset = PRESETS[given.preset]
    for name in given.rows:
        if name not in ROWS:
            known = ", ".join(ROWS)
            raise UsageError(f"--rows has {name!r}; the rows are {known}{nearest(name, ROWS)}")
    limit_threads(given.threads)
    config = preset.resolve(arguments[1:])
    command.use_compilation_cache()
    machine, rows = benchmark(config, preset.pivot, given.rows, given.repeats)
    if given.json:
        out = {"preset": given.preset, "config": config.to_dict()}
        write_json({**out, "hardware": machine, "rows": rows}, Path(given.json))


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_enum(
        "preset", "golden_perf", sorted(PRESETS), "sizes; --config.FIELD=VALUE changes a field"
    )
    command.define_path("json", "", "file to write the figures to")
    flags.DEFINE_integer(
        "threads", 0, "CPU threads that compute; 0 is one for each core", lower_bound=0
    )
    flags.DEFINE_integer(
        "repeats", 5, "timed runs of each row, after one that warms up", lower_bound=1
    )
    flags.DEFINE_list("rows", list(ROWS), "which rows")


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
