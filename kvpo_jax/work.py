"""How much an iteration computes, stage by stage, counted in the programs that it calls.

The run's own loops are traced with shapes in place of arrays, so that they say themselves how often
they call which program. Nothing runs on an accelerator, and no program is compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import memory, network, train
from kvpo_jax.decoder import VideoDecoder
from kvpo_jax.memory import Iteration, shape
from kvpo_jax.rewards import composite, scorers
from kvpo_jax.rollout import rollout
from kvpo_jax.run import Run
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Array, Judged, Pixels, PyTree, Rollout, Scores, Windows

# ---------------------------------------------------------------- the work of a program

# FLOP/s of products that an H100 or H200 can reach: of bfloat16, of float32 in TF32, and of float32
# in float32 (`layers.exact`), for which it has no tensor cores. The data sheet has 989, 495 and 67
# TFLOP/s; the first two at a clock that the card does not hold.
PEAK = {"bfloat16": 790e12, "tf32": 395e12, "float32": 67e12}
EFFICIENCY = 0.5  # share of it that programs are taken to reach


@dataclasses.dataclass(frozen=True)
class Work:
    """What is computed on a device.

    Attributes:
      flops: of matrix products and convolutions.
      seconds: that these take at PEAK.
      bytes: that are read and written: operands and results of products, and what is gathered or
        joined. What lies between is taken as fused with them, and so are attention's logits.
      sent: to other devices, by the collective operations that the program states.
    """

    flops: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0
    sent: network.Traffic = dataclasses.field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            network.total((self.sent, other.sent)),
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.flops * times,
            self.seconds * times,
            self.bytes * times,
            network.times(self.sent, times),
        )


def sum_of(works: Iterable[Work]) -> Work:
    """The sum of any number of works."""
    return sum(works, Work())


# How often a condition takes its branch with the most work, from 0 to 1: one number for all of a
# program, or one for each in the order in which they are traced, and 0 for those after them.
Taken = float | Sequence[float]


def of_program(jaxpr: core.Jaxpr, taken: Taken = 1.0) -> Work:
    """The work of a traced program, its loops multiplied.

    Args:
      jaxpr: of the program.
      taken: 0 for a replay without its gradient (`Programs.replay`).

    Raises:
      ValueError: a loop of unknown length has products.
    """
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler does
    if isinstance(taken, float):
        return _work(live, itertools.repeat(taken))
    return _work(live, itertools.chain(taken, itertools.repeat(0.0)))


def _work(jaxpr: core.Jaxpr, taken: Iterator[float]) -> Work:
    return sum_of(_work_of(equation, taken) for equation in jaxpr.eqns)


def _work_of(equation: core.JaxprEqn, taken: Iterator[float]) -> Work:
    name = equation.primitive.name
    if count := PRODUCTS.get(name):
        return _product(equation, count(equation))
    if sent := network.of_equation(equation):
        return Work(sent=sent)
    if name in memory.KEPT and name != "scan":
        return Work(bytes=2 * sum(map(_bytes, equation.outvars)))
    share = next(taken) if name == "cond" else 1.0
    bodies = [_work(body, taken) for body in memory.bodies(equation)]
    if name == "cond":
        least, *_, most = sorted(bodies, key=lambda work: work.flops)
        return least * (1 - share) + most * share
    work = sum_of(bodies)
    if name == "while" and work.flops:
        raise ValueError("a loop of unknown length has products, which cannot be counted")
    return work * equation.params["length"] if name == "scan" else work


def _product(equation: core.JaxprEqn, flops: float) -> Work:
    sizes = [_bytes(x) for x in (*equation.invars, *equation.outvars)]
    kind = "bfloat16" if _aval(equation.invars[0]).dtype.itemsize < 4 else "tf32"
    if kind == "tf32" and "HIGHEST" in str(equation.params.get("precision")):
        kind = "float32"
    # In attention every pair of batch row and head is a product of its own, with logits.
    if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]:
        sizes.remove(max(sizes))
    return Work(flops, flops / PEAK[kind], sum(sizes))


def _aval(x: Any) -> Any:
    """Shape and dtype of an operand."""
    return x.aval


def _bytes(x: Any) -> int:
    return math.prod(_aval(x).shape) * _aval(x).dtype.itemsize


def _dot(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    sizes, out = _aval(equation.invars[0]).shape, _aval(equation.outvars[0]).shape
    return 2.0 * math.prod(out) * math.prod(sizes[i] for i in contracted)


def _convolution(equation: core.JaxprEqn) -> float:
    kernel, out = _aval(equation.invars[1]).shape, _aval(equation.outvars[0]).shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(out) * math.prod(kernel) / features


def _cudnn(products: int, equation: core.JaxprEqn) -> float:
    """So many products of queries [n, T, H, D] and keys [n, K, H, D]."""
    queries, keys = (_aval(x).shape for x in equation.invars[:2])
    return 2.0 * products * math.prod(queries) * keys[1]


# Operation -> its FLOPs. cuDNN's backward pass computes the logits again.
PRODUCTS: Mapping[str, Callable[[core.JaxprEqn], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": partial(_cudnn, 2),
    "dot_product_attention_bwd_wrapper": partial(_cudnn, 5),
}


# ---------------------------------------------------------------- the work of a loop

Calls = dict[str, Work]  # program or stage -> the work of all its calls


def of_loop(
    loop: Callable,
    *arguments: PyTree,
    taken: Taken | Callable[[str, Sequence[np.ndarray | None]], Taken] = 1.0,
) -> Calls:
    """The work of the programs that a loop of the host calls, by their names.

    Args:
      loop: calls programs; it must not look at what they return.
      arguments: its arguments as shapes.
      taken: see `of_program`; or a function of a program's name and arguments, which are arrays
        where the loop has them from NumPy, and None elsewhere.
    """
    counted: dict[Any, Work] = {}
    calls: Calls = {}
    traced = jax.make_jaxpr(loop)(*arguments)
    known = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))

    def value(x: Any) -> np.ndarray | None:
        return np.asarray(x.val) if isinstance(x, core.Literal) else known.get(x)

    for equation in traced.jaxpr.eqns:
        program, name = (equation.params.get(key) for key in ("jaxpr", "name"))
        if not (name and isinstance(program, core.ClosedJaxpr)):
            continue  # an operation between the programs
        share = taken(name, [*map(value, equation.invars)]) if callable(taken) else taken
        key = (id(program), share)
        if key not in counted:
            counted[key] = of_program(program.jaxpr, share)
        calls[name] = calls.get(name, Work()) + counted[key]
    return calls


# ---------------------------------------------------------------- the work of an iteration

# Program of a rollout -> its stage.
ROLLOUT = {
    "encode_text": "text keys and values",
    "shared_block": "prefix",
    "branch_block": "anchor and branches",
    "shared_recache": "recaches at prompt switches",
    "branch_recache": "recaches at prompt switches",
}


class Count(NamedTuple):
    """The work of an iteration.

    Attributes:
      stages: of a device: stage -> work; the mean over the pivots and over on and off policy.
      pivots: how many there are.
    """

    stages: dict[str, Work]
    pivots: int

    def seconds(self, efficiency: float) -> float:
        """Seconds of an iteration at this share of PEAK."""
        return sum_of(self.stages.values()).seconds / efficiency


def count(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    choose: Callable[[Sequence[int]], Sequence[int]] = tuple,
) -> Count:
    """The work of an iteration in which every prompt switch changes the sentence.

    Attention counts as cuDNN's where it can be used on a GPU. Held-out evaluations are not counted.

    Args:
      config: a checked one; with train.micro_batch=0 all prompts are taken at once.
      devices: of the mesh, any.
      choose: the pivots of which it is the mean, of all that there can be.

    Raises:
      UsageError: the config does not fit together, or not to so many devices.
    """
    if config.model.attention in ("auto", "cudnn"):
        config = config.copy_and_resolve_references()
        config.model.attention = "as_cudnn"
    iteration = memory.trace_iteration(config, devices)
    pivots = choose(iteration.run.pivots)
    stages = (
        _rollouts(iteration, pivots)
        | _decoding(iteration, pivots)
        | _scoring(iteration, pivots, devices)
        | _replays(iteration)
    )
    batches = config.train.prompts_per_iteration // config_lib.prompts_at_once(config)
    worked = {name: work * batches for name, work in stages.items() if work.flops or work.sent}
    return Count(worked, len(pivots))


def _mean(calls: Calls, of: Sequence, stages: Mapping[str, str]) -> Calls:
    """Stage -> work, the mean over what has been traced `of`."""
    out: Calls = {}
    for name, work in calls.items():
        stage = stages.get(name, name)
        out[stage] = out.get(stage, Work()) + work * (1 / len(of))
    return out


def _rollouts(iteration: Iteration, pivots: Sequence[int]) -> Calls:
    run, explored = iteration.run, iteration.explored
    config, to_pixel = run.config, run.backbone.to_pixel
    changed = np.ones_like(explored.batch.changed)
    noise = explored.noise
    drawn = jax.eval_shape(run.programs.draw, noise.key, noise.prompts, memory.START)

    def loop(variables: PyTree, embeddings: Array, noise: Any, drawn: Array) -> list[Rollout]:
        batch = dataclasses.replace(explored.batch, embeddings=embeddings, changed=changed)
        return [
            rollout(
                run,
                variables,
                batch,
                noise,
                drawn,
                pivot,
                backbone_lib.blocks_read(config, to_pixel, _windows(run, pivot), pivot),
            )
            for pivot in pivots
        ]

    variables = run.variables(iteration.state.lora)
    drawn = memory.placed(drawn, run.mesh)
    calls = of_loop(loop, variables, explored.batch.embeddings, noise, drawn)
    return _mean(calls, pivots, ROLLOUT)


def _windows(run: Run, pivot: int) -> Windows:
    """What is read of a group that is not pictured."""
    return backbone_lib.windows_read(run.config, run.backbone.to_pixel, pivot)


def _decoding(iteration: Iteration, pivots: Sequence[int]) -> Calls:
    run, rolled = iteration.run, iteration.rolled
    weights = memory.placed(run.backbone.load_decoder(None), run.mesh)

    def loop(weights: PyTree, branches: Array, anchor: Array) -> list:
        backbone = dataclasses.replace(run.backbone, load_decoder=lambda place: weights)
        decoder = VideoDecoder(backbone, run.mesh, run.config.video.block_frames)
        return [decoder.group(branches, anchor, pivot, _windows(run, pivot)) for pivot in pivots]

    def taken(name: str, arguments: Sequence[np.ndarray | None]) -> tuple[float, ...]:
        """How often each stage runs, from the depths of the latent frames (`decoder.make_step`)."""
        if name != "step":
            return ()
        _, _, depth, *state = arguments[len(jax.tree.leaves(weights)) :]
        assert depth is not None
        frames = depth if state else depth[1:]  # the first of a video passes all
        return tuple(float(np.mean(frames > stage)) for stage in range(depth.max()))

    calls = of_loop(loop, weights, rolled.branches, rolled.anchor, taken=taken)
    return _mean(calls, pivots, {"step": "decoding"})


def _replays(iteration: Iteration) -> Calls:
    run, state, train_config = iteration.run, iteration.state, iteration.run.config.train
    batch = iteration.explored.batch
    zeros = cast(Array, np.zeros(iteration.rolled.branches.shape[:2], np.float32))
    judged = Judged(Scores(zeros, zeros[:, 0], {}), zeros, zeros[:, 0] > 0, zeros)
    cycle = [config_lib.is_on_policy(run.config, i) for i in range(train_config.rollouts_per_sync)]

    def loop(run_params: PyTree, state: Any, rolled: Rollout, embeddings: Array) -> list:
        own = dataclasses.replace(run, params=run_params)
        prompts = batch.replace(embeddings=embeddings)
        return [
            train.remember(own, state, rolled, prompts, judged, on_policy) for on_policy in cycle
        ]

    kept = of_loop(loop, run.params, state, iteration.rolled, batch.embeddings, taken=0.0)
    # As the loop gives it to the program, from the host, so that the program is not traced again.
    experience = iteration.experience.replace(
        advantages=shape(zeros.shape, zeros.dtype),
        gate_open=shape(zeros.shape[:1], bool),
        on_policy=shape((), bool),
    )
    replayed = (state.lora, run.params, experience, shape((), bool))
    learned = of_loop(run.programs.replay, *replayed)
    return {
        "energies of other policies": sum_of(kept.values()) * (1 / len(cycle)),
        "energies and gradient": sum_of(learned.values()) * train_config.epochs,
    }


# ---------------------------------------------------------------- scoring


def _scoring(iteration: Iteration, pivots: Sequence[int], devices: Sequence[jax.Device]) -> Calls:
    """Of learned rewards; others are taken as nothing."""
    run, config = iteration.run, iteration.run.config
    mesh = Mesh(np.asarray(devices), "data")  # an idle device of the run scores too
    names = [n for n in scorers.names_of(config.reward.scorer) if n in memory.PUBLISHED]
    calls = Counter(call for pivot in pivots for call in scored_clips(run, pivot))
    return {
        f"scoring: {name}": sum_of(
            _scorer(config, name, mesh, call) * (times / len(pivots))
            for call, times in calls.items()
        )
        for name in names
    }


class Call(NamedTuple):
    """What a reward scores at once: so many clips of so many frames, and what they share."""

    clips: int
    frames: int
    shared: composite.Shared | None


def scored_clips(run: Run, pivot: int) -> list[Call]:
    """The calls of the rewards in an iteration."""
    config, prompts = run.config, config_lib.prompts_at_once(run.config)
    calls: list[Call] = []

    def scorer(
        pixels: Array, sentences: Sequence[str], shared: composite.Shared | None = None
    ) -> dict[str, np.ndarray]:
        clips, frames = pixels.shape[:2]
        calls.append(Call(clips, frames, shared))
        return {name: np.zeros(clips) for name in config.reward.weights}

    backbone = dataclasses.replace(run.backbone, rewards=cast(scorers.Scorers, scorer))
    windows, fork = _windows(run, pivot), run.backbone.to_pixel(pivot * config.video.block_frames)
    read = sum(end - start for start, end in windows)
    shape = (prompts, config.rollout.branches, read, 1, 1, 3)  # of a tiny picture
    videos = cast(Array, np.zeros(shape, np.uint8))
    pixels = Pixels(videos, videos[:, :1], windows, fork)
    sentences = [[""] * (len(config.video.switch_frames) + 1)] * prompts
    backbone_lib.score_group(config, backbone, sentences, pixels, pivot)
    return calls


def _scorer(config: ml_collections.ConfigDict, name: str, mesh: Mesh, call: Call) -> Work:
    """The work of a reward in a call."""
    published = memory.reward_of(config, name)
    cfg = published.cfg
    told = {"shared": call.shared} if call.shared and name in scorers.OF_FRAMES else {}

    def loop(params: PyTree, pixels: Array) -> Mapping[str, Array]:
        reward = published.reward(params, cfg, mesh, published.batch)
        return published.score(reward, pixels, [""] * call.clips, **told)

    sides = (8 * config.video.height, 8 * config.video.width)
    pixels = shape((call.clips, call.frames, *sides, 3), jnp.uint8)
    return sum_of(of_loop(loop, published.abstract(cfg), pixels).values())
