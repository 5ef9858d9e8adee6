"""KVPO, its ablations and its rivals: what each changes in a configuration.

`FILE:METHOD`, or `FILE:PRESET+METHOD`, is a configuration with these fields (docs/methods.md).
A method is a choice of what is explored (`rollout.explore`), what is replayed (`replay.states`,
`.context`) and how velocities become a loss (`objective.kind`); nothing else knows its name. What a
method does not set is the configuration's: prompts, pivots, LoRA, learning rate, branches. Reward
Forcing is missing: it needs a teacher of 14B parameters and a critic; `rwr` and `awm` weigh by
reward without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

Fields = Mapping[str, Any | Callable[[ConfigDict], Any]]


def _window(config: ConfigDict) -> int:
    """The blocks that KVPO replays; at least two, where the pivot alone is explored."""
    return max(2, config.replay.blocks, config.rollout.window_blocks)


def _most_steps(config: ConfigDict) -> int:
    """60 % of the steps but the last one."""
    return max(1, round(0.6 * (len(config.sampler.steps) - 1)))


def _all_steps(config: ConfigDict) -> int:
    """Every state of a block has a gradient; the release's preset has one in two of them."""
    return len(config.sampler.steps)


def _times(factor: float) -> Callable[[ConfigDict], float]:
    return lambda config: factor * config.objective.beta


# Losses of a state have no anchor to beat, and no policy over the group.
STATE_BY_STATE = {
    "objective.gate": "none",
    "objective.beta": 0.0,
    "replay.energy": "velocity",
    "replay.grad_steps": _all_steps,
}
DRAWN = {
    **STATE_BY_STATE,
    "rollout.explore": "transition",
    "replay.states": "transitions",
    "replay.context": "own",
    "objective.kind": "ratio",
    "objective.advantage": "group",
    "objective.advantage_clip": 5.0,
}
ENDS = {
    **STATE_BY_STATE,
    "rollout.explore": "init_noise",
    "rollout.noise_scale": 1.0,  # noise of their own altogether
    "replay.states": "ends",
    "replay.context": "own",
}
NEIGHBOURS = {
    **STATE_BY_STATE,
    "rollout.explore": "init_noise",
    "replay.states": "branch",
    "objective.kind": "neighbours",
    "objective.tau": 1.0,  # neither source gives one
    "objective.tau_unit": "group_std",
    "objective.anchors": 4,
}
# The pivot alone is explored, and as many blocks as KVPO's are replayed: only in those after it has
# noise an energy.
NOISE_IN_PIVOT = {
    "rollout.explore": "init_noise",
    "rollout.window_blocks": 1,
    "replay.blocks": _window,
}

METHODS: dict[str, Fields] = {
    # arXiv 2605.14278: the configuration as it is.
    "kvpo": {},
    # Eq. 21, Table 2: distances of clean latents to the anchor's prediction in place of TVE.
    "chr_l2": {"replay.states": "anchor", "replay.energy": "latent"},
    # Appendix D, Fig. 1: noise in place of routed history.
    "noise_tve": NOISE_IN_PIVOT,
    "noise_l2": {**NOISE_IN_PIVOT, "replay.states": "anchor", "replay.energy": "latent"},
    # Noise and routed history together, in the whole window.
    "chr_noise_tve": {"rollout.explore": "routing+init_noise"},
    # arXiv 2511.16955: clean latents are compared, not the next states; the anchors are the first.
    "neighbor_grpo": {
        **NEIGHBOURS,
        "rollout.noise_scale": 0.3,
        "replay.context": "own",
        "objective.advantage": "quasi_norm",
        "objective.clip_low": 0.2,
        "objective.clip_high": 0.2,
    },
    # AR-CoPO, on policy: two updates of the same rollout; no buffer of reference groups.
    "ar_copo": {
        **NEIGHBOURS,
        "rollout.noise_scale": 0.5,
        "rollout.window_blocks": 1,
        "replay.blocks": 0,
        "replay.context": "anchor",
        "objective.advantage": "group",
        "objective.clip_low": 1e-4,
        "objective.clip_high": 1e-4,
        "train.epochs": 2,
    },
    # yifan123/flow_grpo: the blocks of the window, not of the video.
    "flow_grpo": {
        **DRAWN,
        "rollout.kernel": "flow_sde",
        "rollout.stochasticity": 0.7,
        "replay.step_weight": "flow_grpo",
        "objective.beta": 0.004,
        "objective.clip_low": 1e-3,
        "objective.clip_high": 1e-3,
    },
    # XueZeyue/DanceGRPO: 60 % of the steps, at random.
    "dance_grpo": {
        **DRAWN,
        "rollout.kernel": "dance_sde",
        "rollout.stochasticity": 0.3,
        "replay.steps_drawn": _most_steps,
        "objective.clip_low": 1e-4,
        "objective.clip_high": 1e-4,
    },
    # Flow-GRPO with the kernel that keeps the marginals at few steps.
    "cps_grpo": {
        **DRAWN,
        "rollout.kernel": "cps",
        "rollout.stochasticity": 0.8,
        "objective.clip_low": 1e-3,
        "objective.clip_high": 1e-3,
    },
    # RAVEN: one step of each group; its weights of chunks and its factor 100 are left out.
    "cm_grpo": {
        **DRAWN,
        "rollout.kernel": "cps",
        "rollout.stochasticity": 1.0,
        "replay.steps_drawn": 1,
        "objective.kind": "regression",
        "objective.advantage": "per_reward",
    },
    # NVlabs/DiffusionNFT: its KL is of velocities, here of clean latents.
    "nft": {
        **ENDS,
        "objective.kind": "nft",
        "replay.energy": "latent",
        "objective.beta": 1e-4,
        "objective.advantage": "batch_std",
        "train.old_decay_step": 0.001,
        "train.old_decay": 0.5,
    },
    # franklinz233/Astrolabe: block by block after a clean past, not a clip all of which is noisy;
    # the reference is the policy that training starts from, not the base without its adapter.
    "astrolabe": {
        **ENDS,
        "objective.kind": "nft",
        "objective.adaptive": False,
        "objective.mix": 0.1,
        "replay.energy": "latent",
        "replay.times": (1.0, 0.75, 0.5, 0.25),
        "replay.grad_steps": 4,
        "replay.steps_drawn": 1,
        "objective.beta": 1e-4,
        "objective.advantage": "batch_std",
        "train.old_decay_step": 0.001,
        "train.old_decay": 0.5,
    },
    # The forward-process twin of TVE: Flow-Factory's log-probability in KVPO's policy and clip.
    "awm": {
        "rollout.explore": "init_noise",
        "rollout.noise_scale": 1.0,
        "replay.states": "ends",
        "replay.context": "own",
        "replay.energy": "velocity",
        "replay.grad_steps": _all_steps,
    },
    # Reward-weighted regression, of end points.
    "rwr": {**ENDS, "objective.kind": "regression", "objective.advantage": "softmax"},
    # Table 2: perturbed blocks, local slots, length of the local window, perturbed steps.
    "blocks_3": {"rollout.window_blocks": 3},
    "blocks_5": {"rollout.window_blocks": 5},
    "blocks_7": {"rollout.window_blocks": 7},
    "slots_3": {"window.near": 6, "window.excluded": 6},
    "slots_9": {"window.near": 0, "window.excluded": 0},
    "random_window": {"rollout.draw": "random_length"},
    "steps_1": {"rollout.perturbed_steps": 1},
    "steps_3": {"rollout.perturbed_steps": 3},
    "steps_4": {"rollout.perturbed_steps": 4},
    # Table 3, whose default is 5: the weight of the KL in proportion to the configuration's.
    "kl_0": {"objective.beta": 0.0},
    "kl_1": {"objective.beta": _times(1 / 5)},
    "kl_3": {"objective.beta": _times(3 / 5)},
    "kl_10": {"objective.beta": _times(2.0)},
}


def apply(config: ConfigDict, method: str) -> ConfigDict:
    """The configuration of a method: a copy with its fields."""
    out = config.copy_and_resolve_references()
    fields = {
        name: value(config) if callable(value) else value for name, value in METHODS[method].items()
    }
    with out.unlocked():
        out.update_from_flattened_dict(fields)
    return out
