"""The axis alphabet, and the frozen structs that travel between the stages of an iteration.

Axes, used in every docstring, einsum and sharding spec:

    P  prompts (one prompt sequence each)     S  solver steps per block
    G  branches                               B  blocks of the video
    W  blocks of the perturbed window         F  latent frames per block
    M  prompt segments per video              N  tokens per latent frame
    L  transformer layers                     A  context frames that a block attends to
    H, D  heads, head dim                     Y, X, C  latent height, width, channels
    T  trajectories: the anchor and the branches of one prompt (see `sharding.trajectories`)
    K  text tokens

Frames and blocks are numbered from 0 (the paper counts from 1). `pivot` is the first perturbed
block, `F * pivot` the fork frame. Latent video is channels-last, `float[..., frames, Y, X, C]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array
PyTree = Any
Windows = tuple[tuple[int, int], ...]  # pixel frames [start, end) of a video


class TextKV(struct.PyTreeNode):
    """Cross-attention keys and values of one prompt per batch row (`Wan.encode_text`).

    Attributes:
      k: float[L, batch, K, H, D], after the key norm.
      v: float[L, batch, K, H, D].
    """

    k: Array
    v: Array


class BlockKV(struct.PyTreeNode):
    """Self-attention keys and values that one forward pass wrote for its own frames.

    Attributes:
      k: float[L, batch, F, N, H, D], after the key norm and RoPE at the absolute frame.
      v: float[L, batch, F, N, H, D].
    """

    k: Array
    v: Array


class MemoryBank(struct.PyTreeNode):
    """MemFlow's narrative bank (see memory_bank.py); "..." are the axes of a KVCache's `frame` but
    the last.

    Attributes:
      k: float[L, ..., slots, N, H, D], after the key norm and RoPE.
      v: float[L, ..., slots, N, H, D].
      frame: int32[L, ..., slots], the absolute frame in each slot, -1 empty; layers choose for
        themselves.
      new_k: float[L, ..., N, H, D], of the frame that was recorded last.
      new_v: float[L, ..., N, H, D].
      new_frame: int32[L, ...].
      recorded: int32[L, ...], frames recorded so far.
      pending: bool[L, ...], whether the last one has still to enter.
      interval: every so many blocks leave their first frame (static).
      reinsert: whether the frame enters again before every block until the next one is recorded, as
        in the released code, so that a full bank ends up with copies of it (static).
      heads_axis: the mesh axis over which H is split; None: a device has all heads (static).
    """

    k: Array
    v: Array
    frame: Array
    new_k: Array
    new_v: Array
    new_frame: Array
    recorded: Array
    pending: Array
    interval: int = struct.field(pytree_node=False, default=3)
    reinsert: bool = struct.field(pytree_node=False, default=False)
    heads_axis: str | None = struct.field(pytree_node=False, default=None)


class KVCache(struct.PyTreeNode):
    """An immutable ring of past frames. Frame f lives in the slot `kv_cache.slot_of(f)`.

    Attributes:
      k: float[L, ..., slots, N, H, D], with the axes of `frame` between L and N.
      v: float[L, ..., slots, N, H, D].
      frame: int32[..., slots], the absolute frame held by each slot; -1 is empty, and -2 - f waits
        for frame f (`kv_cache.keep`).
      bank: the far past as MemFlow keeps it, or None.
      sink: number of leading slots that are never evicted (static).
      kept: number of last slots, each of which holds or awaits one chosen frame (static).
      span: frames within which positions are counted, `kv_cache.positions`; its keys are stored
        without RoPE then. 0: with RoPE, at their absolute frame (static).
    """

    k: Array
    v: Array
    frame: Array
    bank: MemoryBank | None = None
    sink: int = struct.field(pytree_node=False, default=3)
    kept: int = struct.field(pytree_node=False, default=0)
    span: int = struct.field(pytree_node=False, default=0)


class BlockRecord(struct.PyTreeNode):
    """One generated block: the states that the solver visited, and the clean latent.

    Attributes:
      z: float[P, T, S, F, Y, X, C], solver states (network inputs), z_{b,s} of the paper.
      u: float[P, T, S, F, Y, X, C], the velocities predicted there, u_hat_{b,s} of the paper.
      x_clean: float[P, T, F, Y, X, C].
    """

    z: Array
    u: Array
    x_clean: Array


class PromptBatch(struct.PyTreeNode):
    """P prompt sequences, ready for the rollout.

    Attributes:
      embeddings: float[P, M, K, text_dim].
      changed: bool[P, M], where a segment's sentence differs from the one before it.
      numbers: int32[P], the number of each prompt in its iteration, or among the held-out ones.
      sentences: P sequences of M sentences (static).
    """

    embeddings: Array
    changed: np.ndarray
    numbers: np.ndarray
    sentences: tuple[tuple[str, ...], ...] = struct.field(pytree_node=False)


class ReplayTuples(struct.PyTreeNode):
    """What a rollout leaves for the replay (Algorithm 1, step 2), with the unperturbed context.

    Attributes:
      z: float[P, G, W, S, F, Y, X, C]. At the first step it is the noise, which all branches share
        unless they explore with it.
      u: float[P, G, W, S, F, Y, X, C].
      history: KVCache with frame int32[P, slots], as it stood at the fork; without a bank.
      page: KVCache with frame int32[P, slots], what the anchor wrote in the window; or int32[P, G,
        slots], what each branch wrote, where the replay reads that. Its bank, [L, P, W, ...], is
        what the anchor attended to at each block; None without a bank.
      frames: int32[W, A], deployment window of each block.
      start_frame: int32[W].
      segment: int32[W], prompt segment of each block.
      noise: float[P, W, F, Y, X, C], noise of the cache-writing pass; None unless the replay is
        self-rolled, which alone reads it.
      anchor: float[P, W, S, F, Y, X, C], the states of the anchor; None unless they are replayed.
      fresh: float[P, W, N, F, Y, X, C], noise for the branches' end points, the same for all of a
        prompt; None unless these are replayed.
      peers: float[P, W, S, G, F, Y, X, C], the clean latents of all branches at every state; None
        unless each state is compared with them.
      steps: int32[P, n], which states of each block are replayed of a prompt; None: all.
    """

    z: Array
    u: Array
    history: KVCache
    page: KVCache
    frames: Array
    start_frame: Array
    segment: Array
    noise: Array | None
    anchor: Array | None = None
    fresh: Array | None = None
    peers: Array | None = None
    steps: Array | None = None


class Rollout(struct.PyTreeNode):
    """The videos of one group (Algorithm 1, steps 1 and 2); 0 beyond the last block that was made.

    Attributes:
      branches: float[P, G, frames, Y, X, C], clean latents.
      anchor: float[P, frames, Y, X, C].
      routed_frames: int32[P, G, routed], the past frames that CHR drew for each branch.
      text: TextKV float[L, P, M, K, H, D], made by the policy of the rollout.
      replay: ReplayTuples.
    """

    branches: Array
    anchor: Array
    routed_frames: Array
    text: TextKV
    replay: ReplayTuples


class Pixels(struct.PyTreeNode):
    """Frames of the videos of P prompts, float in [0, 1] or uint8.

    Attributes:
      videos: [P, T, n, h, w, 3], n frames of the branches of a group, or of single videos (T = 1).
      anchor: [P, 1, n, h, w, 3], of one more trajectory; None for single videos.
      windows: the n frames are the frames [start, end) of the whole video, of one window after the
        other; windows may overlap (static).
      fork: before this frame of the whole video all trajectories of a prompt are the same (static).
    """

    videos: Array
    anchor: Array | None
    windows: Windows = struct.field(pytree_node=False)
    fork: int = struct.field(pytree_node=False, default=0)


class Scores(struct.PyTreeNode):
    """Rewards of a group and of its anchor.

    Attributes:
      branches: float[P, G], the composite reward.
      anchor: float[P].
      components: name -> (float[P, G], float[P]), the raw scores before weighting.
    """

    branches: Array
    anchor: Array
    components: Mapping[str, tuple[Array, Array]]


class Judged(struct.PyTreeNode):
    """A group with its rewards (Algorithm 1, step 3).

    Attributes:
      scores: of its P groups.
      advantages: float[P, G].
      gate_open: bool[P], whether a branch beats the anchor.
      pixel_std: float[], of the branches of a group, the mean over the pixels that are scored.
      appearance: name -> float[P, G], of the same pixels, see `programs.appearance`.
    """

    scores: Scores
    advantages: Array
    gate_open: Array
    pixel_std: Array
    appearance: Mapping[str, Array] = struct.field(default_factory=dict)


class Experience(struct.PyTreeNode):
    """A rollout with its rewards, as the update reads it (Algorithm 1, step 4).

    Attributes:
      tuples: ReplayTuples of P prompts.
      embeddings: float[P, M, K, text_dim].
      text: TextKV float[L, P, M, K, H, D], made by the policy of the rollout.
      advantages: float[P, G].
      gate_open: bool[P], whether a branch beats the anchor.
      energies_old: float[P, G] under pi_old; ignored where `on_policy`.
      energies_ref: float[P, G] under pi_ref.
      energy_unit: float[], the spread that is common to the prompts of an iteration.
      on_policy: bool[], theta equals old: the old energies are those of theta.
      old: the LoRA tree of pi_old, where the loss reads its velocities, and they can be others than
        those of theta; else None.
      reference: the LoRA tree of pi_ref, where the loss reads its velocities; else None.
    """

    tuples: ReplayTuples
    embeddings: Array
    text: TextKV
    advantages: Array | np.ndarray
    gate_open: Array | np.ndarray
    energies_old: Array
    energies_ref: Array
    energy_unit: Array
    on_policy: Array | np.ndarray
    old: PyTree | None = None
    reference: PyTree | None = None


class Replayed(struct.PyTreeNode):
    """What the replay of a micro-batch says of a policy, beside the gradient.

    Attributes:
      energies: float[P, G] of Eq. 5; of a loss that is taken state by state its mean over the
        states of a branch (of an anchor, where states are compared with all branches).
      floor: float[P, G], what rounding makes of energies that are 0, see `replay.anchor_energies`;
        None where they are not known apart.
      probability: float[P, G], what the policy gives each branch (Eq. 6); None where the loss has
        no policy over the branches.
      ratio: float[P, G], over what the old policy gives it (Eq. 7), exactly 1 on policy; None
        likewise.
      weight: float[P], how much say each prompt has in the update, see `objective.prompt_weight`.
    """

    energies: Array
    floor: Array | None
    probability: Array | None
    ratio: Array | None
    weight: Array


class Gradient(struct.PyTreeNode):
    """Sums over the micro-batches of an optimiser step.

    Attributes:
      lora: gradient of the loss.
      squared: float[], the squared norm of each one's gradient.
      counted: int32[], prompts of whose loss the gate leaves something.
      metrics: name -> float[].
    """

    lora: PyTree
    squared: Array
    counted: Array
    metrics: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """How the rows of a frame lie over the devices of a mesh axis while it is decoded.

    The devices have them in order, as many each. Where they do not divide them, the last ones have
    rows beyond the frame, which nothing reads. Latents, pixels and what a decoder remembers are
    split at the same places.

    Attributes:
      axis: of the mesh.
      devices: of that axis.
      count: the rows of a frame of latents.
    """

    axis: str
    devices: int
    count: int

    @property
    def of_device(self) -> int:
        """The rows of latents of each device."""
        return -(-self.count // self.devices)

    @property
    def padded(self) -> int:
        """The rows of all devices."""
        return self.of_device * self.devices
