"""Checks and times a GPU in some minutes, with random weights of the real sizes.

    python tools/check_device.py --json=device.json

It needs no checkpoint. Each part is a process of its own, so that one that fails, or needs more
memory than there is, leaves the others as they are:

    devices        what JAX sees, and the driver
    attention      cuDNN's against our own tiles at the real sizes, forward and gradient
    block of one   a block of one trajectory: the prefix (programs.shared_block)
    block of nine  a block of the anchor and 8 branches (programs.branch_block)
    replay         a chunk of solver states, with gradient (programs.replay)
    VAE step       a block of latents to pixels, through every stage
    HPSv3          a batch of frames
    golden         the tests against the arrays of the authors' code, in float32; needs pytest

The timed parts tell seconds, the speed, its share of the peak of `kvpo-plan --work`, and the memory
beside what is planned for the same program. The last table has an iteration of configs/longlive.py
for one prompt: what `kvpo-plan --work` counts, and what follows from the measured speeds. Without a
GPU everything is tiny, to see that it runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from random_run import Preset, RandomRun, peak_memory_bytes

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import memory, work
from kvpo_jax.algorithm import routing
from kvpo_jax.decoder import make_step
from kvpo_jax.errors import UsageError, nearest, shortened
from kvpo_jax.models import attention as attention_lib
from kvpo_jax.models import reward_model, wan_vae
from kvpo_jax.models.attention import Keys
from kvpo_jax.models.qwen2_vl import TextConfig, VisionConfig, cut_after
from kvpo_jax.rewards import learned, preprocess
from kvpo_jax.runtime import command, progress, sharding
from kvpo_jax.runtime.atomic import write_json
from kvpo_jax.types import PyTree

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-2  # of attention in bfloat16: the norm of the difference over the norm

# ---------------------------------------------------------------- sizes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
      preset: of the generator.
      vae: None is that of the preset.
      hpsv3: of the reward.
      golden: which golden tests run (pytest -k).
      repeats: timed calls of a program.
    """

    preset: Preset
    vae: wan_vae.VAEConfig | None
    hpsv3: reward_model.RewardConfig
    golden: str
    repeats: int


TINY_MODEL = {
    "model.dim": 32,
    "model.ffn_dim": 64,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.freq_dim": 16,
    "model.text_dim": 8,
    "model.text_len": 4,
    "lora.rank": 4,
    "lora.alpha": 4.0,
    "video.height": 4,
    "video.width": 4,
}
SIZES = {
    "full": Sizes(
        preset=Preset("configs/longlive.py", {}, pivot=5),
        vae=None,
        hpsv3=reward_model.HPSV3,
        golden="block or chr or recache or theta_grad4",
        repeats=3,
    ),
    "tiny": Sizes(
        preset=Preset("configs/longlive.py", TINY_MODEL, pivot=5),
        vae=wan_vae.VAEConfig(base_dim=8, num_res_blocks=1),
        hpsv3=dataclasses.replace(
            reward_model.HPSV3,
            text=TextConfig(vocab=151658, dim=8, heads=2, kv_heads=1, ffn_dim=16, layers=1),
            vision=VisionConfig(dim=16, ffn_dim=32, heads=2, layers=1),
            head=(4, 2),
            min_pixels=4 * 28 * 28,
            max_pixels=4 * 28 * 28,
        ),
        golden="cap18 and block",
        repeats=1,
    ),
}

# ---------------------------------------------------------------- a program, timed


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a program.

    Attributes:
      program: compiled.
      arguments: arrays, and what the program takes besides.
      kept: (argument, result) if the program overwrites an argument with a result, else None.
      share: of the work of the call, what the part is about.
    """

    program: Any
    arguments: Sequence[Any]
    kept: tuple[int, int] | None = None
    share: float = 1.0


def timed(call: Call, repeats: int) -> dict[str, float]:
    """What a call takes, after a first one that compiles, and what was counted and planned."""
    arguments = list(call.arguments)
    arrays = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
    traced = call.program.trace(*arguments).jaxpr.jaxpr
    planned = memory.bytes_of(arrays) + memory.working_bytes(traced)
    del arrays
    counted = work.of_program(traced) * call.share

    def run() -> float:
        begin = time.perf_counter()
        out = jax.block_until_ready(call.program(*arguments))
        if call.kept:
            argument, result = call.kept
            arguments[argument] = out[result]
        return time.perf_counter() - begin

    first = run()
    seconds = call.share * float(np.median([run() for _ in range(repeats)]))
    return {
        "seconds": seconds,
        "first_seconds": first,
        "flops": counted.flops,
        "flops_per_s": counted.flops / seconds,
        "share_of_peak": counted.seconds / seconds,
        "peak_bytes": peak_memory_bytes(),
        "planned_bytes": planned,
    }


def random_like(shapes: PyTree) -> PyTree:
    """Random arrays of these shapes, made in one program."""
    leaves, tree = jax.tree.flatten(shapes)

    def make(key):
        pairs = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        made = [0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in pairs]
        return jax.tree.unflatten(tree, made)

    return jax.jit(make)(jax.random.key(0, impl="rbg"))


# ---------------------------------------------------------------- the parts


def devices(sizes: Sizes) -> dict[str, Any]:
    """What JAX sees; the driver, if there is one."""
    found = jax.devices()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        said = []
    limit = (found[0].memory_stats() or {}).get("bytes_limit")
    return {
        "platform": found[0].platform,
        "kind": found[0].device_kind,
        "count": len(found),
        "driver": said[0] if said else None,
        "bytes_limit": limit,
        "jax": jax.__version__,
        "platform_version": " ".join(found[0].client.platform_version.split()),
    }


def attention(sizes: Sizes) -> dict[str, float]:
    """A block that attends to its whole window; UsageError if the two differ."""
    config = sizes.preset.resolve()
    model, video, window = config.model, config.video, routing.window(config.window)
    tokens = (video.height // model.patch[1]) * (video.width // model.patch[2])
    queries, past = video.block_frames * tokens, (window.sink + window.past) * tokens
    heads = (model.num_heads, model.dim // model.num_heads)
    keys = jax.random.split(jax.random.key(0), 6)

    def half(key, count):
        return jax.random.normal(key, (1, count, *heads), jnp.bfloat16)

    q, k, v, towards = (half(key, queries) for key in keys[:4])
    context = Keys(*(half(key, past) for key in keys[4:]), length=jnp.full(1, past, jnp.int32))

    def forward(name, q, k, v):
        return attention_lib.attention(q, Keys(k, v), context, name)

    def gradient(name, q, k, v):
        return jax.vjp(partial(forward, name), q, k, v)[1](towards)

    fused = "cudnn" if jax.default_backend() == "gpu" else "as_cudnn"
    out: dict[str, float] = {}
    for what, function in (("forward", forward), ("gradient", gradient)):
        results = {}
        for name in (fused, "xla"):
            call = Call(jax.jit(partial(function, name)), (q, k, v))
            results[name] = jax.tree.leaves(call.program(*call.arguments))
            kind = "xla" if name == "xla" else "cudnn"
            out[f"{what}_{kind}_seconds"] = timed(call, sizes.repeats)["seconds"]
        out[f"{what}_difference"] = max(map(_difference, results[fused], results["xla"]))
        if not out[f"{what}_difference"] <= TOLERANCE:
            difference = out[f"{what}_difference"]
            raise UsageError(f"{what}: cuDNN's attention differs from our own by {difference:.3f}")
    return out


def _difference(x: jax.Array, like: jax.Array) -> float:
    """The norm of the difference over the norm."""
    x, like = (np.asarray(y, np.float32) for y in (x, like))
    return float(np.linalg.norm(x - like) / np.linalg.norm(like))


def block_of_one(sizes: Sizes) -> dict[str, float]:
    """The prefix's program, over a full window."""
    made = RandomRun(sizes.preset.resolve(), sizes.preset.pivot)
    spoken = (made.variables, made.text, made.segment)
    arguments = (*spoken, made.history, made.noise, made.fork_frame)
    return timed(Call(made.run.programs.shared_block, arguments, kept=(3, 1)), sizes.repeats)


def block_of_nine(sizes: Sizes) -> dict[str, float]:
    """The program of anchor and branches, at the fork."""
    made = RandomRun(sizes.preset.resolve(), sizes.preset.pivot)
    spoken = (made.variables, made.text, made.segment)
    pages = made.run.programs.fork(made.history)
    drawn = (made.routed_frames, made.window_blocks)
    arguments = (*spoken, made.history, pages, *drawn, made.noise, made.fork_frame)
    del pages
    return timed(Call(made.run.programs.branch_block, arguments, kept=(4, 1)), sizes.repeats)


def replay(sizes: Sizes) -> dict[str, float]:
    """Seven chunks of four states: three of each of two branches, and the first steps, which they
    share. With two epochs every step has a gradient.
    """
    fields = {"rollout.branches": 2, "rollout.window_blocks": 4, "train.epochs": 2}
    config = sizes.preset.resolve([f"--config.{name}={x}" for name, x in fields.items()])
    made = RandomRun(config, sizes.preset.pivot)
    arguments = (made.lora, made.run.params, made.experience, np.asarray(True))
    return timed(Call(made.run.programs.replay, arguments, share=1 / 7), sizes.repeats)


def vae_step(sizes: Sizes) -> dict[str, float]:
    """The decoder's program, at a later block than the first."""
    config = sizes.preset.resolve()
    backbone, mesh = memory.fileless_backbone(config), memory.make_mesh(config, jax.devices()[:1])
    shapes, decode = backbone.load_decoder(None), backbone.decode
    if sizes.vae:
        shapes = wan_vae.abstract_decoder_params(sizes.vae)
        decode = partial(backbone_lib.decode, sizes.vae)
    video = config.video
    frames = 2 * video.block_frames
    latents = memory.shape((1, 1, frames, video.height, video.width, config.model.channels), "f4")
    latents, weights = sharding.place((random_like(latents), random_like(shapes)), mesh)
    step = make_step(decode, mesh, video.block_frames)
    every_stage = np.full(video.block_frames, np.iinfo(np.int32).max, np.int32)
    _, state = step(weights, latents, 0, every_stage, None)
    arguments = (weights, latents, video.block_frames, every_stage, state)
    return timed(Call(step, arguments, kept=(4, 1)), sizes.repeats)


def hpsv3(sizes: Sizes) -> dict[str, float]:
    """The reward's program, with a long text."""
    config, cfg = sizes.preset.resolve(), sizes.hpsv3
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "data")
    published = memory.PUBLISHED["hpsv3"]
    batch = published.batch
    params = sharding.place(random_like(published.abstract(cfg)), mesh)
    reward = memory.without_tokenizer(params, cfg, mesh, batch)
    sides = (8 * config.video.height, 8 * config.video.width)
    visual = cfg.vision.tokens(preprocess.grid(cfg, 1, *sides))
    tokens = cut_after(learned.texts(reward, [""] * batch, cfg.image_token, visual), cfg.token_ids)
    clips = jax.random.bits(jax.random.key(1), (batch, 1, *sides, 3), "uint8")
    step = learned.scoring_step(cfg, mesh, preprocess.resize_pil)
    return timed(Call(step, sharding.place((params, tokens, clips), mesh)), sizes.repeats)


CHECKS: dict[str, Callable[[Sizes], dict[str, Any]]] = {"devices": devices, "attention": attention}
TIMED: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "block of one": block_of_one,
    "block of nine": block_of_nine,
    "replay": replay,
    "VAE step": vae_step,
    "HPSv3": hpsv3,
}
PARTS = (*CHECKS, *TIMED, "golden")

# Stage of an iteration -> the part whose speed it has.
SPEED = {
    "text keys and values": "block of one",
    "prefix": "block of one",
    "anchor and branches": "block of nine",
    "recaches at prompt switches": "block of nine",
    "decoding": "VAE step",
    "scoring: hpsv3": "HPSv3",
    "scoring: videoalign": "HPSv3",
    "energies of other policies": "replay",
    "energies and gradient": "replay",
}

# ---------------------------------------------------------------- processes


def in_process(name: str, size: str, deadline: float) -> dict[str, Any]:
    """What a part returns that runs in a process of its own; {"error": a line} if it fails."""
    left = deadline - time.monotonic()
    if left <= 0:
        return {"error": "there was no time left"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        program = [__file__, f"--part={name}", f"--size={size}", f"--json={path}"]
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
        if name == "golden":
            selected = ["-m", "golden", "-k", SIZES[size].golden, "tests/golden_test.py"]
            options = "-q -rfE -o addopts= -p no:cacheprovider".split()
            program = ["-m", "pytest", *options, *selected]
            environment["KVPO_TEST_PLATFORM"] = "cpu" if size == "tiny" else "cuda"
        try:
            done = subprocess.run(
                [sys.executable, *program],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"it was not done after {left:.0f} s"}
        if name == "golden":
            return _of_pytest(done)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return {"error": said[-1].removeprefix("error: ") if said else _ended(done.returncode)}
        return json.loads(path.read_text())


def _of_pytest(done: subprocess.CompletedProcess) -> dict[str, str]:
    said = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if line.strip()]
    failed = [line.split()[1] for line in said if line.startswith(("FAILED", "ERROR "))]
    passed = [line for line in said if " passed" in line]
    if done.returncode:
        return {"error": shortened(failed) or (said[-1] if said else _ended(done.returncode))}
    return {"outcome": passed[-1].strip("= ")}


def _ended(code: int) -> str:
    return f"it was ended by signal {-code}" if code < 0 else f"it ended with status {code}"


def run_part(name: str, size: str, path: str) -> None:
    """Prints what one part returns in this process, or writes it; UsageError if it fails."""
    command.use_compilation_cache()
    try:
        figures = (CHECKS | TIMED)[name](SIZES[size])
    except UsageError:
        raise
    except Exception as error:  # whatever a device or its libraries raise
        text = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise UsageError(text) from error
    if path:
        write_json(figures, Path(path))
    else:
        print(json.dumps(figures, indent=2))


# ---------------------------------------------------------------- the report


def iteration(size: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An iteration of one prompt on one device, counted and as it follows from the parts."""
    config = SIZES[size].preset.resolve()
    count = work.count(config, jax.devices()[:1])
    stages = []
    for name, stage in count.stages.items():
        speed = parts.get(SPEED[name], {}).get("flops_per_s")
        stages.append(
            {
                "name": name,
                "pflop": stage.flops / 1e15,
                "counted_seconds": stage.seconds / work.EFFICIENCY,
                "seconds": stage.flops / speed if speed else None,
            }
        )
    known = [stage["seconds"] for stage in stages]
    return {
        "counted_seconds": count.seconds(work.EFFICIENCY),
        "seconds": None if None in known else sum(known),
        "stages": stages,
    }


def _number(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value / scale:.4g}"


def show(parts: Mapping[str, Mapping[str, Any]], whole: Mapping[str, Any]) -> None:
    """Prints the three tables."""
    outcomes = [(name, part.get("error") or _outcome(name, part)) for name, part in parts.items()]
    progress.table("", ("part", "outcome"), outcomes)
    print()
    timed_parts = {name: part for name, part in parts.items() if "flops_per_s" in part}
    if timed_parts:
        columns = ("part", "s", "TFLOP", "TFLOP/s", "of peak", "peak GB", "planned GB")
        rows = [
            (
                name,
                _number(part["seconds"]),
                _number(part["flops"], 1e12),
                _number(part["flops_per_s"], 1e12),
                f"{part['share_of_peak']:.1%}",
                _number(part["peak_bytes"], 1e9),
                _number(part["planned_bytes"], 1e9),
            )
            for name, part in timed_parts.items()
        ]
        progress.table("", columns, rows)
        print()
    stages = [*whole["stages"], {**whole, "name": "sum", "pflop": None}]
    rows = [
        (s["name"], *(_number(s[key]) for key in ("pflop", "counted_seconds", "seconds")))
        for s in stages
    ]
    progress.table(
        "an iteration of one prompt on one device",
        ("stage", "PFLOP", f"s at {work.EFFICIENCY:.0%}", "s as measured"),
        rows,
    )


def _outcome(name: str, part: Mapping[str, Any]) -> str:
    if name == "devices":
        limit = f", {part['bytes_limit'] / 1e9:.0f} GB for JAX" if part["bytes_limit"] else ""
        driver = f", driver {part['driver']}" if part["driver"] else ""
        return f"{part['count']} x {part['kind']}{limit}{driver}; jax {part['jax']}"
    if name == "attention":
        return "; ".join(
            f"{what} differs by {part[f'{what}_difference']:.1e}, in"
            f" {part[f'{what}_cudnn_seconds']:.3g} s (our own: {part[f'{what}_xla_seconds']:.3g} s)"
            for what in ("forward", "gradient")
        )
    return part.get("outcome", "timed below")


def _check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise UsageError(f"--{flag} has {name!r}; the parts are {listed}{nearest(name, known)}")


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    if len(arguments) > 1:
        raise UsageError(f"unknown argument {arguments[1]!r}")
    if given.part:
        _check_names("part", [given.part], [*CHECKS, *TIMED])
        run_part(given.part, given.size, given.json)
        return
    _check_names("parts", given.parts, PARTS)
    if not 0 < given.minutes <= 600:
        raise UsageError(f"--minutes={given.minutes:g} has to be above 0 and up to 600")
    deadline = time.monotonic() + 60 * given.minutes
    jax.config.update("jax_platforms", "cpu")  # the device belongs to the parts
    found = in_process("devices", "tiny", deadline)
    size = "full" if found.get("platform") == "gpu" else "tiny"
    if size == "tiny":
        print("there is no GPU: everything is tiny, and its seconds say nothing", flush=True)
    parts = {"devices": found} if "devices" in given.parts else {}
    names = [name for name in given.parts if name != "devices"]
    with progress.bar("check", len(names)) as advance:
        for name in names:
            parts[name] = in_process(name, size, deadline)
            advance(1, f"check: {name}")
    whole = iteration(size, parts)
    show(parts, whole)
    if given.json:
        rows = [{"name": name, **part} for name, part in parts.items()]
        write_json({"size": size, "parts": rows, "iteration": whole}, Path(given.json))
    if failed := [name for name, part in parts.items() if "error" in part]:
        raise UsageError(f"{len(failed)} of {len(parts)} parts failed: {', '.join(failed)}")


def define_flags() -> None:
    """The flags of the command."""
    command.define_path("json", "", "file to write the figures to")
    flags.DEFINE_list("parts", list(PARTS), "which parts")
    flags.DEFINE_float("minutes", 10.0, "after which no part begins or goes on")
    flags.DEFINE_string("part", "", "only this part, in this process, with the sizes of --size")
    flags.DEFINE_enum("size", "tiny", sorted(SIZES), "sizes of --part")


if __name__ == "__main__":
    command.run(__name__, define_flags, main)
