"""How fast the stages of an iteration are, how far from the machine's peak, and what memory they take.

    python tools/benchmark.py --preset=golden_perf --threads=1 --json=benchmark.json
    python tools/benchmark.py --preset=longlive --rows=denoise_forward,window_rollout_G --config.rollout.branches=4

Runs on one device, with random weights and for one prompt; what the numbers are does not matter to the speed. Every
row is the package's own code on a state that its own rollout left behind:

    denoise_forward          one solver step of one block of one trajectory at the pivot
    window_rollout_1         the perturbed window of one branch: fork, then W blocks of S solver steps and a cache write
    window_rollout_G         the same for G branches at once, without the anchor
    replay_forward           the energies of G branches (train.make_energies)
    replay_forward_backward  the same and the gradient of a Gibbs policy's loss with respect to LoRA
    iteration                text, prefix, anchor and branches to the end of the video, reference energies and update;
                             without decoder and reward, which are not the generator's

The preset golden_perf is the work that tests/golden/perf.json describes, with the release's semantics: there each
branch replays under what it wrote itself, 24 passes. `--config.replay.context=anchor` is the paper's replay of 20.
`flops` are the matrix products that a row needs, counted by formula; what is recomputed or masked does not count.
On CPU, `cpu_s` (processor time) tells a busy machine from slow code: seconds are those of an idle one where
cpu_s / threads is not much less.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags

from kvpo_jax import config as config_lib
from kvpo_jax import flow, kv_cache, memory_bank, objective, rollout, routing, sharding, train
from kvpo_jax.models.wan import Wan, WanConfig, init_variables, wan_config

ROWS = (
    "denoise_forward", "window_rollout_1", "window_rollout_G", "replay_forward", "replay_forward_backward", "iteration",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preset:
    """A config file, the fields that differ from it, and the first perturbed block."""

    config: str
    fields: Mapping[str, Any]
    pivot: int


PRESETS = {
    "golden_perf": Preset(
        "configs/tiny.py:release",
        {
            "model.dim": 256, "model.ffn_dim": 1024, "model.num_heads": 4, "model.num_layers": 6,
            "model.freq_dim": 256, "model.text_dim": 256, "model.text_len": 64, "model.channels": 16,
            "model.remat": "products",
            "lora.rank": 32, "lora.alpha": 32.0,  # an eighth of the width; LongLive's adapter is a sixth of its
            "video.height": 16, "video.width": 16, "video.blocks": 13, "video.switch_frames": (),
            "rollout.branches": 8, "rollout.window_blocks": 5, "replay.blocks": 5, "replay.chunk": 5,
        },
        pivot=8,
    ),
    "tiny": Preset("configs/tiny.py", {}, pivot=5),
    "longlive": Preset("configs/longlive.py", {}, pivot=25),
}  # fmt: skip
ONE_PROMPT = {"train.prompts_per_iteration": 1, "train.micro_batch": 0}

# Dense bfloat16 products per second on the data sheet, by a part of jax's device_kind.
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

_PRESET = flags.DEFINE_enum("preset", "golden_perf", sorted(PRESETS), "sizes; --config.FIELD=VALUE changes a field")
_JSON = flags.DEFINE_string("json", "", "file to write the figures to")
_THREADS = flags.DEFINE_integer("threads", 0, "CPU threads that compute; 0 is one for each core", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each row, after one that warms up", lower_bound=1)
_NAMES = flags.DEFINE_list("rows", list(ROWS), "which rows")


# ---------------------------------------------------------------- counted work


def forward_flops(cfg: WanConfig, tokens: int, frames: int, past: int) -> int:
    """Multiplications and additions of the matrix products of one pass: `frames` frames attend to `past` others too.

    A product [m, k] x [k, n] is 2 m k n. `tokens` is N. Norms, softmax, rotations and gelu are left out: a percent.
    So is LoRA in float32, where batches go through kernels that it was added to.
    """
    q, keys, d = frames * tokens, (frames + past) * tokens, cfg.dim
    patch = cfg.channels * cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    linears = 6 * d * d + 2 * d * cfg.ffn_dim  # self q, k, v, o; cross q, o; MLP
    lora = cfg.lora_rank * (6 * (d + d) + 2 * (d + cfg.ffn_dim)) if cfg.dtype != "float32" else 0
    attention = 2 * d * (keys + cfg.text_len)  # logits, and what they weight
    time_mlp = cfg.freq_dim * d + d * d + 6 * d * d
    return 2 * (cfg.num_layers * q * (linears + lora + attention) + 2 * q * d * patch + time_mlp)


def backward_flops(cfg: WanConfig, tokens: int, frames: int, past: int, text_gradient: bool) -> int:
    """Of the backward pass that follows `forward_flops`, with gradients of LoRA alone.

    Linears carry the gradient to their input and none to their weights; LoRA does both. The past has no gradient; the
    text's keys and values have one where `text_gradient` (what comes before them is a thousandth and left out).
    """
    q, keys, d = frames * tokens, (frames + past) * tokens, cfg.dim
    patch = cfg.channels * cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    linears = 6 * d * d + 2 * d * cfg.ffn_dim
    lora = 2 * cfg.lora_rank * (6 * (d + d) + 2 * (d + cfg.ffn_dim))
    # Of probabilities and queries over all keys, of keys and values over those that have a gradient.
    attention = 2 * d * (keys + q + cfg.text_len * (2 if text_gradient else 1))
    return 2 * (cfg.num_layers * q * (linears + lora + attention) + q * d * patch)


def text_flops(cfg: WanConfig) -> int:
    """The text keys and values of one prompt."""
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

    # A routed row has as many frames as the deployment window.
    past = lambda block: min(block * video.block_frames, window.sink + window.past)
    passed = lambda frames, past: Work(forward_flops(cfg, tokens, frames, past), frames * tokens)
    forward = lambda block: passed(video.block_frames, past(block))
    text = Work(text_flops(cfg)) * segments

    recache = passed(window.recache_frames, window.sink)
    switches = lambda block: block * video.block_frames in video.switch_frames

    def blocks(first: int, last: int) -> Work:
        """Blocks first ... last - 1 of one trajectory, and the recaches at the prompt switches between."""
        out = Work()
        for block in range(first, last):
            out += forward(block) * (steps + 1) + recache * (block > first and switches(block))
        return out

    def replayed(backward: bool) -> Work:
        out, recorded = Work(), range(pivot, pivot + rollout.recorded_blocks(config))
        for block in recorded:
            out += forward(block) * steps
            if backward:
                flops = backward_flops(cfg, tokens, video.block_frames, past(block), own_text)
                out += Work(flops) * min(replay.grad_steps, steps)
            if replay.context == "self_rolled" and block != recorded[-1]:
                # What it writes, and the last step without its gradient where it has one.
                out += forward(block) * (2 if replay.grad_steps >= steps else 1)
        return out * branches + text * own_text

    # A switch at the pivot is made once, before the fork.
    whole = text + blocks(0, pivot) + recache * switches(pivot) + blocks(pivot, video.blocks) * (1 + branches)
    of_window = blocks(pivot, pivot + config.rollout.window_blocks)
    return {
        "denoise_forward": forward(pivot),
        "window_rollout_1": of_window,
        "window_rollout_G": of_window * branches,
        "replay_forward": replayed(backward=False),
        "replay_forward_backward": replayed(backward=True),
        "iteration": whole + replayed(backward=False) + replayed(backward=True),
    }


# ---------------------------------------------------------------- the rows


class Bench:
    """The functions to time, each made when it is asked for, on one device and for one prompt."""

    def __init__(self, config: ml_collections.ConfigDict, pivot: int):
        self.config, self.pivot, self.cfg = config, pivot, wan_config(config)
        self.model, self.window = Wan(self.cfg), routing.window(config)
        self.mesh = sharding.make_mesh(1, 1, 1, config.rollout.branches)
        self.stages = rollout.build(config, self.mesh)
        self.fork_frame = pivot * config.video.block_frames
        self.block = (config.video.block_frames, config.video.height, config.video.width, config.model.channels)
        self.key = jax.random.key(0)
        self.noise = rollout.NoiseKey(self.key, jnp.arange(1))
        segments = len(config.video.switch_frames) + 1
        self.changed = np.ones((1, segments), bool)
        shape = (1, segments, config.model.text_len, config.model.text_dim)
        self.embeddings = sharding.place(jax.random.normal(self.key, shape), self.mesh)

    @cached_property
    def variables(self):
        return sharding.place(jax.jit(partial(init_variables, self.cfg))(self.key), self.mesh)

    @cached_property
    def text(self):
        return self.stages.encode_text(self.variables, self.embeddings)

    @cached_property
    def prompt(self):
        """Text keys and values of the segment that the pivot is in."""
        segment = rollout.segment_of(self.fork_frame, self.config.video.switch_frames)
        return jax.tree.map(lambda x: x[:, :, segment], self.text)

    @cached_property
    def history(self):
        """The cache at the fork."""
        return rollout.generate(
            self.stages, self.config, self.variables, self.text, self.changed, self.noise, self.pivot
        )[1]

    @cached_property
    def selected(self):
        return self.stages.draw(self.key, jnp.arange(1), self.fork_frame)

    def _rollout(self, blocks: int):
        short = self.config.copy_and_resolve_references()
        short.video.blocks = blocks
        return rollout.rollout(
            self.stages,
            short,
            self.mesh,
            self.variables,
            self.text,
            self.changed,
            self.noise,
            self.selected,
            self.pivot,
        )

    @cached_property
    def tuples(self):
        return self._rollout(self.pivot + rollout.recorded_blocks(self.config)).replay

    def denoise_forward(self) -> Callable[[], Any]:
        @jax.jit
        def forward(variables, text, history, x, start):
            row = routing.deployment_row(self.window, start)
            context = memory_bank.attend(kv_cache.read(row[None, None], history), history.bank)
            return self.model.apply(variables, x, jnp.ones(1), text, context, start[None])[0]

        x, start = jax.random.normal(self.key, (1, *self.block)), jnp.asarray(self.fork_frame, jnp.int32)
        return lambda: forward(self.variables, self.prompt, self.history, x, start)

    def window_rollout(self, branches: int) -> Callable[[], Any]:
        sampler, perturb = self.config.sampler, self.config.rollout
        schedule = flow.schedule(sampler.steps, sampler.shift, sampler.solver, sampler.context_step)
        passes = len(sampler.steps) + 1
        routed = np.append(np.arange(passes - 1) < perturb.perturbed_steps, perturb.perturb_write)
        slots = self.window.sink + max(
            self.config.window.recache_frames, rollout.recorded_blocks(self.config) * self.block[0]
        )

        @jax.jit
        def fork(history):
            kv = history.k.shape
            return kv_cache.empty(kv[0], (1, branches), slots, *kv[3:], self.window.sink, history.k.dtype)

        @partial(jax.jit, donate_argnums=3)
        def block(variables, text, history, page, selected, key, start):
            rows = jnp.where(
                routed[:, None],
                routing.routed_rows(self.window, selected, start)[:, :, None],
                routing.deployment_row(self.window, start),
            )
            noise = rollout.block_noise(key, start, (passes, *self.block))
            network = partial(self.model.apply, variables)
            record, kv = rollout.denoise_block(network, schedule, text, history, page, rows, noise, start)
            return record, kv_cache.append(page, kv, start)

        def run():
            page, records = fork(self.history), []
            for b in range(perturb.window_blocks):
                start = self.fork_frame + b * self.block[0]
                record, page = block(
                    self.variables, self.prompt, self.history, page, self.selected[:, :branches], self.noise, start
                )
                records.append(record)
            return records, page

        return run

    def replay(self, backward: bool) -> Callable[[], Any]:
        energies = train.make_energies(self.config, self.mesh)

        def loss(lora, params, *replayed):
            """Minus the log-probability of the first branch."""
            return -jax.vmap(partial(objective.log_policy, tau=1.0))(energies(params, lora, *replayed))[:, 0].mean()

        gradient = jax.jit(jax.value_and_grad(loss))
        forward = jax.jit(energies)
        replayed = (self.embeddings, self.text, self.tuples)
        if backward:
            return lambda: gradient(self.variables["lora"], self.variables["params"], *replayed)
        return lambda: forward(self.variables["params"], self.variables["lora"], *replayed)

    def iteration(self) -> Callable[[], Any]:
        """As the loop in train.py, on policy, with advantages from nowhere."""
        config, params = self.config, self.variables["params"]
        optimiser = train.make_optimiser(config.train)
        energies = jax.jit(train.make_energies(config, self.mesh))
        gradient, apply = train.make_gradient(config, self.mesh), train.make_apply(config, self.mesh, optimiser)
        state = train.init_state(config, optimiser, self.mesh, self.variables["lora"])
        advantages = jax.random.normal(self.key, (1, config.rollout.branches))

        def run():
            behaviour = {"params": params, "lora": state.old}
            text = self.stages.encode_text(behaviour, self.embeddings)
            selected = self.stages.draw(self.key, jnp.arange(1), self.fork_frame)
            videos = rollout.rollout(
                self.stages, config, self.mesh, behaviour, text, self.changed, self.noise, selected, self.pivot
            )
            reference = energies(params, state.reference, self.embeddings, text, videos.replay)
            experience = train.Experience(
                tuples=videos.replay, embeddings=self.embeddings, text=text, advantages=advantages,
                safe=jnp.ones(1, bool), energies_old=reference, energies_ref=reference, on_policy=jnp.asarray(True),
            )  # fmt: skip
            return apply(state, gradient(state.lora, params, experience)[0])

        return run

    def row(self, name: str) -> Callable[[], Any]:
        """The function of a row."""
        return {
            "denoise_forward": self.denoise_forward,
            "window_rollout_1": partial(self.window_rollout, 1),
            "window_rollout_G": partial(self.window_rollout, self.config.rollout.branches),
            "replay_forward": partial(self.replay, backward=False),
            "replay_forward_backward": partial(self.replay, backward=True),
            "iteration": self.iteration,
        }[name]()


# ---------------------------------------------------------------- measuring


def limit_threads(threads: int) -> None:
    """Keeps this process on so many cores. Before jax meets a device: XLA's pool gets a thread for each of them."""
    if threads:
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise ValueError(f"--threads={threads}, but this process may use {len(cores)} cores only")
        os.sched_setaffinity(0, cores[-threads:])


def reset_peak() -> None:
    """Linux forgets the process's highest resident size; elsewhere the peak is that of the process's whole life."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Of an accelerator, its allocator's peak in the process's life; on CPU, the process's highest resident size."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(run: Callable[[], Any], repeats: int) -> tuple[list[float], float, int]:
    """Seconds of each repeat after one that is not counted, mean processor seconds, and peak memory."""
    jax.block_until_ready(run())
    reset_peak()
    seconds, begin = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds, (time.process_time() - begin) / repeats, peak_memory_bytes()


def matrix_peak(dtype: str) -> float:
    """The best measured FLOP/s of a square matrix product."""
    best = 0.0
    for n in (512, 1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        product = jax.jit(lambda a, b: a @ b)
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


def benchmark(
    config: ml_collections.ConfigDict, pivot: int, names: Sequence[str], repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(hardware, rows), the rows as they go into the JSON."""
    machine = hardware(config.model.dtype)
    peak = machine["data_sheet_flops_per_s"] or machine["matrix_peak_flops_per_s"]
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    print(
        f"\n{'row':24s} {'median s':>10s} {'min s':>10s} {'spread':>7s} {'cpu s':>10s} {'tokens/s':>10s} "
        f"{'GFLOP':>10s} {'GFLOP/s':>10s} {'of peak':>8s} {'peak MB':>8s}"
    )
    bench, work, rows = Bench(config, pivot), counted(config, pivot), []
    for name in names:
        seconds, processor, memory = measure(bench.row(name), repeats)
        median, best, flops = float(np.median(seconds)), min(seconds), work[name].flops
        rows.append(
            {
                "name": name,
                "median_s": median,
                "min_s": best,
                "n": repeats,
                "flops": flops,
                "peak_memory_bytes": memory,
                "max_s": max(seconds),
                "cpu_s": processor,
                "tokens_per_s": work[name].tokens / median,
                "flops_per_s": flops / median,
                "share_of_peak": flops / median / peak,
            }
        )
        print(
            f"{name:24s} {median:10.4f} {best:10.4f} {(max(seconds) - best) / median:7.0%} {processor:10.4f} "
            f"{work[name].tokens / median:10.0f} {flops / 1e9:10.3f} {flops / median / 1e9:10.1f} "
            f"{flops / median / peak:8.1%} {memory / 1e6:8.0f}",
            flush=True,
        )
    return machine, rows


def main(arguments: list[str]) -> None:
    preset = PRESETS[_PRESET.value]
    try:
        for name in _NAMES.value:
            if name not in ROWS:
                raise ValueError(f"--rows has {name!r}; the rows are {', '.join(ROWS)}")
        limit_threads(_THREADS.value)
        fields = [f"--config.{name}={value}" for name, value in {**ONE_PROMPT, **preset.fields}.items()]
        config = config_lib.resolve(preset.config, None, [*fields, *arguments[1:]])
        config_lib.use_compilation_cache()
        machine, rows = benchmark(config, preset.pivot, _NAMES.value, _REPEATS.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if _JSON.value:
        out = {"preset": _PRESET.value, "config": config.to_dict(), "hardware": machine, "rows": rows}
        config_lib.write_json(out, Path(_JSON.value))


if __name__ == "__main__":
    app.run(main, flags_parser=config_lib.parse_flags)
