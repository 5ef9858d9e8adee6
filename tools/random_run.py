"""A run with random weights, and how its functions are timed: for benchmark.py and check_device.py.

Speed hardly depends on the numbers, so no checkpoint is needed.
"""

from __future__ import annotations

import dataclasses
import re
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

from kvpo_jax import programs, rollout, train
from kvpo_jax.algorithm import keys
from kvpo_jax.decoder import VideoDecoder
from kvpo_jax.memory import fileless_backbone
from kvpo_jax.models.wan import init_variables
from kvpo_jax.run import Run, make_mesh
from kvpo_jax.runtime import sharding, workdir
from kvpo_jax.runtime.config import recorded_blocks, segment_of, wan_config
from kvpo_jax.state import init_state
from kvpo_jax.types import Array, Experience, Judged, KVCache, PromptBatch, Rollout, Scores, TextKV

# ---------------------------------------------------------------- sizes


@dataclasses.dataclass(frozen=True)
class Preset:
    """A config file, the fields that differ from it, and the first perturbed block."""

    config: str
    fields: Mapping[str, Any]
    pivot: int

    def resolve(self, arguments: Sequence[str] = ()) -> ml_collections.ConfigDict:
        """The config of one prompt, with flags --config.FIELD=VALUE over it."""
        fields = {**ONE_PROMPT, **self.fields}
        own = [f"--config.{name}={value}" for name, value in fields.items()]
        return workdir.resolve(self.config, None, [*own, *arguments])


ONE_PROMPT = {"train.prompts_per_iteration": 1, "train.micro_batch": 0}


# ---------------------------------------------------------------- the run


class RandomRun:
    """A run of random weights on one device and for one prompt, and what its programs take.

    Each part is made when it is asked for.

    Args:
      config: of one prompt per iteration.
      pivot: the first perturbed block.
    """

    def __init__(self, config: ml_collections.ConfigDict, pivot: int):
        self.pivot, self.fork_frame = pivot, pivot * config.video.block_frames
        self.window_blocks = (pivot, pivot + config.rollout.window_blocks)
        self.key = jax.random.key(0)
        mesh, backbone = make_mesh(config, jax.devices()[:1]), fileless_backbone(config)
        variables = jax.jit(partial(init_variables, wan_config(config)))(self.key)
        variables = sharding.place(variables, mesh)
        self.lora = variables["lora"]
        self.run = Run(
            config=config,
            mesh=mesh,
            backbone=backbone,
            params=variables["params"],
            programs=programs.build(config, mesh),
            decoder=VideoDecoder(backbone, mesh, config.video.block_frames),
        )
        self.variables = self.run.variables(self.lora)
        self.noise = keys.NoiseKey(self.key, jnp.arange(1))

    @cached_property
    def batch(self) -> PromptBatch:
        """One prompt with random embeddings, whose sentence changes at every switch."""
        config = self.run.config
        segments = len(config.video.switch_frames) + 1
        shape = (1, segments, config.model.text_len, config.model.text_dim)
        return PromptBatch(
            embeddings=sharding.place(jax.random.normal(self.key, shape), self.run.mesh),
            changed=np.ones((1, segments), bool),
            numbers=np.arange(1, dtype=np.int32),
            sentences=(("",) * segments,),
        )

    @cached_property
    def text(self) -> TextKV:
        """Of all segments."""
        return self.run.programs.encode_text(self.variables, self.batch.embeddings)

    @cached_property
    def segment(self) -> int:
        """The segment that the pivot is in."""
        return segment_of(self.fork_frame, self.run.config.video.switch_frames)

    @cached_property
    def history(self) -> KVCache:
        """The cache at the fork."""
        prompt_at = rollout.script(self.run.config, self.text, self.batch.changed)
        return rollout.prefix(self.run, self.variables, prompt_at, self.noise, self.pivot)[1]

    @cached_property
    def routed_frames(self) -> Array:
        """int32[1, G, routed]."""
        return self.run.programs.draw(self.key, self.noise.prompts, self.fork_frame)

    @cached_property
    def judged(self) -> Judged:
        """Random advantages under an open gate."""
        advantages = jax.random.normal(self.key, (1, self.run.config.rollout.branches))
        scores = Scores(advantages, advantages[:, 0], {})
        return Judged(scores, advantages, jnp.ones(1, bool), jnp.ones(()))

    @cached_property
    def experience(self) -> Experience:
        """What a replay of the window reads."""
        config = self.run.config
        rolled: Rollout = rollout.rollout(
            self.run,
            self.variables,
            self.batch,
            self.noise,
            self.routed_frames,
            self.pivot,
            self.pivot + recorded_blocks(config),
        )
        state = init_state(config, self.run.mesh, self.lora)
        return train.remember(self.run, state, rolled, self.batch, self.judged, on_policy=True)


# ---------------------------------------------------------------- measuring


def reset_peak() -> None:
    """Makes Linux forget the process's highest resident size.

    Elsewhere the peak is that of the process's whole life.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The highest resident size of the process, or on an accelerator its allocator's peak."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    high = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(high[1]) * 1024 if high else 0


def measure(run: Callable[[], Any], repeats: int) -> tuple[list[float], float, int]:
    """Seconds of each repeat, mean processor seconds, peak memory; a first run is not counted."""
    jax.block_until_ready(run())
    reset_peak()
    seconds, begin = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds, (time.process_time() - begin) / repeats, peak_memory_bytes()
