"""How much an iteration computes, stage by stage, counted in the programs that it calls.

The run's own loops are traced with shapes in place of arrays, so that they say themselves how often
they call which program. Nothing runs on an accelerator, and no program is compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from kvpo_jax import memory, train
from kvpo_jax.decoder import VideoDecoder
from kvpo_jax.memory import Iteration, shape
from kvpo_jax.rewards import scorers
from kvpo_jax.rollout import rollout
from kvpo_jax.run import Run
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Array, Judged, PyTree, Rollout, Scores

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
    """

    flops: float = 0.0
    seconds: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.seconds + other.seconds, self.bytes + other.bytes
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.seconds * times, self.bytes * times)


def sum_of(works: Iterable[Work]) -> Work:
    """The sum of any number of works."""
    return sum(works, Work())


def of_program(jaxpr: core.Jaxpr, wanted: bool = True) -> Work:
    """The work of a traced program, its loops multiplied.

    Args:
      jaxpr: of the program.
      wanted: of a condition, the branch with the most work counts; if not, that with the least. So
        a replay has the work of its gradient or not (`Programs.replay`).

    Raises:
      ValueError: a loop of unknown length has products.
    """
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler does
    return _work(live, max if wanted else min)


def _work(jaxpr: core.Jaxpr, choose: Callable) -> Work:
    return sum_of(_work_of(equation, choose) for equation in jaxpr.eqns)


def _work_of(equation: core.JaxprEqn, choose: Callable) -> Work:
    name = equation.primitive.name
    if count := PRODUCTS.get(name):
        return _product(equation, count(equation))
    if name in memory.KEPT and name != "scan":
        return Work(bytes=2 * sum(map(_bytes, equation.outvars)))
    bodies = [_work(body, choose) for body in memory.bodies(equation)]
    if name == "cond":
        return choose(bodies, key=lambda work: work.flops)
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


def of_loop(loop: Callable, *arguments: PyTree, wanted: bool = True) -> Calls:
    """The work of the programs that a loop of the host calls, by their names.

    Args:
      loop: calls programs; it must not look at what they return.
      arguments: its arguments as shapes.
      wanted: see `of_program`.
    """
    counted: dict[int, Work] = {}
    calls: Calls = {}
    for equation in jax.make_jaxpr(loop)(*arguments).jaxpr.eqns:
        program, name = (equation.params.get(key) for key in ("jaxpr", "name"))
        if not (name and isinstance(program, core.ClosedJaxpr)):
            continue  # an operation between the programs
        if id(program) not in counted:
            counted[id(program)] = of_program(program.jaxpr, wanted)
        calls[name] = calls.get(name, Work()) + counted[id(program)]
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


def count(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> Count:
    """The work of an iteration in which every prompt switch changes the sentence.

    Attention counts as cuDNN's where it can be used on a GPU. Held-out evaluations are not counted.

    Args:
      config: a checked one; with train.micro_batch=0 all prompts are taken at once.
      devices: of the mesh, any.

    Raises:
      UsageError: the config does not fit together, or not to so many devices.
    """
    if config.model.attention in ("auto", "cudnn"):
        config = config.copy_and_resolve_references()
        config.model.attention = "as_cudnn"
    iteration = memory.trace_iteration(config, devices)
    stages = (
        _rollouts(iteration)
        | _decoding(iteration)
        | _scoring(iteration, devices)
        | _replays(iteration)
    )
    batches = config.train.prompts_per_iteration // config_lib.prompts_at_once(config)
    worked = {name: work * batches for name, work in stages.items() if work.flops}
    return Count(worked, len(iteration.run.pivots))


def _mean(calls: Calls, of: Sequence, stages: Mapping[str, str]) -> Calls:
    """Stage -> work, the mean over what has been traced `of`."""
    out: Calls = {}
    for name, work in calls.items():
        stage = stages.get(name, name)
        out[stage] = out.get(stage, Work()) + work * (1 / len(of))
    return out


def _rollouts(iteration: Iteration) -> Calls:
    run, explored = iteration.run, iteration.explored
    changed = np.ones_like(explored.batch.changed)
    noise = explored.noise
    drawn = jax.eval_shape(run.programs.draw, noise.key, noise.prompts, memory.START)

    def loop(variables: PyTree, embeddings: Array, noise: Any, drawn: Array) -> list[Rollout]:
        batch = dataclasses.replace(explored.batch, embeddings=embeddings, changed=changed)
        return [rollout(run, variables, batch, noise, drawn, pivot) for pivot in run.pivots]

    variables = run.variables(iteration.state.lora)
    drawn = memory.placed(drawn, run.mesh)
    calls = of_loop(loop, variables, explored.batch.embeddings, noise, drawn)
    return _mean(calls, run.pivots, ROLLOUT)


def _decoding(iteration: Iteration) -> Calls:
    run, rolled = iteration.run, iteration.rolled

    def loop(weights: PyTree, branches: Array, anchor: Array) -> list:
        backbone = dataclasses.replace(run.backbone, load_decoder=lambda place: weights)
        decoder = VideoDecoder(backbone, run.mesh, run.config.video.block_frames)
        return [decoder.group(branches, anchor, pivot) for pivot in run.pivots]

    weights = memory.placed(run.backbone.load_decoder(None), run.mesh)
    calls = of_loop(loop, weights, rolled.branches, rolled.anchor)
    return _mean(calls, run.pivots, {"step": "decoding"})


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

    kept = of_loop(loop, run.params, state, iteration.rolled, batch.embeddings, wanted=False)
    replayed = (state.lora, run.params, iteration.experience, shape((), bool))
    learned = of_loop(run.programs.replay, *replayed)
    return {
        "energies of other policies": sum_of(kept.values()) * (1 / len(cycle)),
        "energies and gradient": sum_of(learned.values()) * train_config.epochs,
    }


# ---------------------------------------------------------------- scoring


def _scoring(iteration: Iteration, devices: Sequence[jax.Device]) -> Calls:
    """Of learned rewards; others are taken as nothing."""
    run, config = iteration.run, iteration.run.config
    mesh = Mesh(np.asarray(devices), "data")  # an idle device of the run scores too
    names = [n for n in scorers.names_of(config.reward.scorer) if n in memory.PUBLISHED]
    calls = Counter(call for pivot in run.pivots for call in scored_clips(run, pivot))
    return {
        f"scoring: {name}": sum_of(
            _scorer(config, name, mesh, *call) * (times / len(run.pivots))
            for call, times in calls.items()
        )
        for name in names
    }


def scored_clips(run: Run, pivot: int) -> list[tuple[int, int]]:
    """The calls of the rewards in an iteration: how many clips of how many frames each has."""
    config, prompts = run.config, config_lib.prompts_at_once(run.config)
    calls: list[tuple[int, int]] = []

    def scorer(pixels: Array, sentences: Sequence[str]) -> dict[str, np.ndarray]:
        clips, frames = pixels.shape[:2]
        calls.append((clips, frames))
        return {name: np.zeros(clips) for name in config.reward.weights}

    backbone = dataclasses.replace(run.backbone, rewards=cast(scorers.Scorers, scorer))
    frames = run.backbone.to_pixel(config.video.blocks * config.video.block_frames)
    pixels = (prompts, config.rollout.branches, frames, 1, 1, 3)  # of a tiny picture
    branches = cast(Array, np.zeros(pixels, np.uint8))
    sentences = [[""] * (len(config.video.switch_frames) + 1)] * prompts
    backbone_lib.score_group(config, backbone, sentences, branches, branches[:, 0], pivot)
    return calls


def _scorer(
    config: ml_collections.ConfigDict, name: str, mesh: Mesh, clips: int, frames: int
) -> Work:
    """The work of a reward in a call."""
    cfg, _, batch, score = memory.reward_of(config, name)

    def loop(params: PyTree, pixels: Array) -> Mapping[str, Array]:
        reward = memory.without_tokenizer(params, cfg, mesh, batch)
        return score(reward, pixels, [""] * clips)

    sides = (8 * config.video.height, 8 * config.video.width)
    pixels = shape((clips, frames, *sides, 3), jnp.uint8)
    return sum_of(of_loop(loop, memory.reward_params(cfg), pixels).values())
