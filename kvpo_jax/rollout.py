"""The rollout (paper §3.2; Algorithm 1, steps 1 and 2): the host's loops over blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from kvpo_jax.algorithm import block as block_lib
from kvpo_jax.algorithm import kv_cache, memory_bank, replay
from kvpo_jax.algorithm.keys import NoiseKey
from kvpo_jax.run import Run
from kvpo_jax.runtime import progress, sharding
from kvpo_jax.runtime.config import branches_at_once, recorded_blocks, segment_of
from kvpo_jax.types import Array, KVCache, PromptBatch, PyTree, Rollout, TextKV


class Spoken(NamedTuple):
    """The prompt of a block.

    Attributes:
      text: TextKV float[L, P, M, K, H, D].
      segment: which of the M.
      changed: bool[P], the prompts whose sentence is another one than at the block before.
    """

    text: TextKV
    segment: int
    changed: np.ndarray


def script(config: ml_collections.ConfigDict, text: TextKV, changed: np.ndarray):
    """first frame of a block -> Spoken, for prompts that switch at config.video.switch_frames.

    Args:
      config: of the run.
      text: float[L, P, M, K, H, D], from `Programs.encode_text`.
      changed: bool[P, M], see `PromptBatch`.
    """
    switches = tuple(config.video.switch_frames)

    def prompt_at(frame: int) -> Spoken:
        segment = segment_of(frame, switches)
        here = changed[:, segment] if frame in switches else np.zeros(len(changed), bool)
        return Spoken(text, segment, here)

    return prompt_at


def _recent(config: ml_collections.ConfigDict, latents: Sequence[Array], axis: int) -> Array:
    """The frames that a prompt switch caches anew, from the blocks so far."""
    blocks = config.window.recache_frames // config.video.block_frames
    return block_lib.join_blocks(latents[-blocks:], axis)


def _switched(
    run: Run,
    variables: PyTree,
    spoken: Spoken,
    history: KVCache,
    latents: Sequence[Array],
    frame: int,
) -> KVCache:
    """The history as the block at `frame` needs it: a prompt switch that is due has been made."""
    if not (latents and spoken.changed.any()):
        return history
    recent = _recent(run.config, latents, 1)
    return run.programs.shared_recache(variables, *spoken, history, recent, frame - recent.shape[1])


def stream(
    run: Run,
    variables: PyTree,
    prompt_at: Callable[[int], Spoken],
    noise: NoiseKey,
    blocks: int,
    drawn: Array | None = None,
) -> Iterator[tuple[Array, KVCache]]:
    """Generates videos under the deployment window, block by block.

    Args:
      run: its programs.
      variables: of the generating policy (`Run.variables`).
      prompt_at: first frame of a block -> its prompt. Where it changes, the keys and values of the
        last frames are made anew with the new sentence, as LongLive switches prompts.
      noise: key of the noise.
      blocks: how many.
      drawn: int32[P, G, routed], frames that the history keeps, because branches are going to be
        routed to them.

    Yields:
      The clean latents float[P, F, Y, X, C] of a block, and the history after it. The history is
      valid until the next block is asked for.
    """
    history = run.programs.blank(len(noise.prompts))
    if history.kept and drawn is not None:
        history = run.programs.keep(history, drawn)
    latents: list[Array] = []
    keep = max(1, run.config.window.recache_frames // run.config.video.block_frames)
    for block in range(blocks):
        frame = block * run.config.video.block_frames
        spoken = prompt_at(frame)
        history = _switched(run, variables, spoken, history, latents, frame)
        x, history = run.programs.shared_block(
            variables, spoken.text, spoken.segment, history, noise, frame
        )
        latents = [*latents, x][-keep:]
        yield x, history


def _wait(latents: Sequence[Array]) -> None:
    """Waits for the block before the newest, so that a loop is one block ahead of what is made."""
    sharding.wait(latents[-2:-1])


def prefix(
    run: Run,
    variables: PyTree,
    prompt_at: Callable[[int], Spoken],
    noise: NoiseKey,
    blocks: int,
    drawn: Array | None = None,
) -> tuple[list[Array], KVCache]:
    """The first blocks of P videos, and the history as the next block needs it.

    Arguments as in `stream`.
    """
    latents, history = [], None
    made = stream(run, variables, prompt_at, noise, blocks, drawn)
    for x, after in progress.steps(made, "shared blocks", blocks):
        latents.append(x)
        history = after
        _wait(latents)
    if history is None:
        history = run.programs.blank(len(noise.prompts))
    frame = blocks * run.config.video.block_frames
    return latents, _switched(run, variables, prompt_at(frame), history, latents, frame)


def generate(
    run: Run, variables: PyTree, batch: PromptBatch, noise: NoiseKey, blocks: int
) -> list[Array]:
    """The first blocks of videos of P prompts without perturbation, float[P, F, Y, X, C] each."""
    text = run.programs.encode_text(variables, batch.embeddings)
    prompt_at = script(run.config, text, batch.changed)
    made, latents = stream(run, variables, prompt_at, noise, blocks), []
    for x, _ in progress.steps(made, "blocks", blocks):
        latents.append(x)
        _wait(latents)
    return latents


# ---------------------------------------------------------------- a group


def rollout(
    run: Run,
    variables: PyTree,
    batch: PromptBatch,
    noise: NoiseKey,
    routed_frames: Array,
    pivot: int,
    blocks: int | None = None,
) -> Rollout:
    """One group of P prompts: shared prefix, then the anchor and G branches.

    Blocks before the pivot are generated once. Within the window the branches' first solver steps
    are routed; after it the default window returns, and what the branches wrote stays in their
    pages, which last as long as their chunk (config.rollout.branch_chunk).

    Args:
      run: its programs.
      variables: of the policy that makes the rollout.
      batch: the prompts.
      noise: key of the noise, which all trajectories of a prompt share, unless the branches explore
        with some of their own (config.rollout.explore).
      routed_frames: int32[P, G, routed], from `Programs.draw`.
      pivot: the first perturbed block.
      blocks: how many are made of a video, at least those that are replayed; None makes all.
    """
    config = run.config
    blocks = config.video.blocks if blocks is None else blocks
    text = run.programs.encode_text(variables, batch.embeddings)
    prompt_at = script(config, text, batch.changed)
    latents, history = prefix(run, variables, prompt_at, noise, pivot, routed_frames)
    fork = _Fork(run, variables, prompt_at, noise, pivot, blocks, latents, history)
    at_once = branches_at_once(config)
    rolled = _rollout_chunk(fork, routed_frames[:, :at_once])
    for first in range(at_once, config.rollout.branches, at_once):
        own = fork._replace(noise=noise.replace(first=np.int32(first)))
        chunk = _rollout_chunk(own, routed_frames[:, first : first + at_once])
        rolled = _with_branches(rolled, chunk)
        del chunk  # its pages, before the next chunk has its own
    return rolled


class _Fork(NamedTuple):
    """Where the trajectories of a group part: what is the same for all of them."""

    run: Run
    variables: PyTree
    prompt_at: Callable[[int], Spoken]
    noise: NoiseKey
    pivot: int
    blocks: int
    latents: list[Array]
    history: KVCache


def _rollout_chunk(fork: _Fork, routed_frames: Array) -> Rollout:
    """The anchor and some of the branches, from the fork to the last block that is made."""
    run, config, pivot, history = fork.run, fork.run.config, fork.pivot, fork.history
    page = run.programs.fork(history)
    trajectories = page.frame.shape[1]
    latents = [block_lib.repeat_trajectories(x, trajectories) for x in fork.latents]
    window_blocks = (pivot, pivot + config.rollout.window_blocks)
    recorded = range(pivot, pivot + recorded_blocks(config))
    records, banks, replayed_page = [], [], page
    for block in progress.steps(range(pivot, fork.blocks), "blocks of branches"):
        frame = block * config.video.block_frames
        text, segment, changed = fork.prompt_at(frame)
        if block > pivot and changed.any():
            recent = _recent(config, latents, 2)
            page = run.programs.branch_recache(
                fork.variables,
                text,
                segment,
                changed,
                history,
                page,
                recent,
                frame - recent.shape[2],
            )
        if block == recorded[-1]:
            # Every later write may evict what the replay of the first blocks reads.
            replayed_page = run.programs.read_page(page)
        record, page = run.programs.branch_block(
            fork.variables,
            text,
            segment,
            history,
            page,
            routed_frames,
            window_blocks,
            fork.noise,
            frame,
        )
        latents.append(record.x_clean)
        _wait(latents)
        if block in recorded:
            records.append(record)
            banks.append(memory_bank.trajectory(page.bank, 0))

    starts = np.array([block * config.video.block_frames for block in recorded], np.int32)
    segments = [segment_of(start, config.video.switch_frames) for start in starts]
    whole = block_lib.filled(latents, config.video.blocks)
    branches, anchor, tuples = run.programs.record(
        whole, records, fork.noise, starts, np.array(segments, np.int32)
    )
    page = replayed_page.replace(bank=replay.stack_banks(banks))
    tuples = tuples.replace(history=history.replace(bank=None), page=page)
    return Rollout(branches, anchor, routed_frames, text, tuples)


def _with_branches(rolled: Rollout, chunk: Rollout) -> Rollout:
    """The branches of two chunks. Each has rolled the same anchor, to keep batch shapes equal."""
    page = rolled.replay.page
    if page.frame.ndim == 3:  # of each branch
        page = kv_cache.join_trajectories(page, chunk.replay.page)
    z, u, branches, routed_frames = (
        block_lib.join_blocks(pair, axis=1)
        for pair in (
            (rolled.replay.z, chunk.replay.z),
            (rolled.replay.u, chunk.replay.u),
            (rolled.branches, chunk.branches),
            (rolled.routed_frames, chunk.routed_frames),
        )
    )
    tuples = rolled.replay.replace(z=z, u=u, page=page)
    return rolled.replace(branches=branches, routed_frames=routed_frames, replay=tuples)
