"""The passes that a run counts: by hand, and in the programs that it really calls."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from equipment import SMALL, configure

from kvpo_jax import budget, memory, methods
from kvpo_jax.algorithm import replay
from kvpo_jax.backbone import blocks_read, windows_read
from kvpo_jax.budget import Spent
from kvpo_jax.errors import UsageError
from kvpo_jax.rewards.composite import latent_to_pixel
from kvpo_jax.rollout import rollout
from kvpo_jax.runtime import config as config_lib

# ---------------------------------------------------------------- by hand

# 49 blocks of 4 steps and a cache-writing pass; 8 branches that part at block 24; 5 are replayed.
PAPER = {"reward.clip_frames": 0, "video.switch_frames": "()", "train.prompts_per_iteration": 1}


def test_the_setting_of_the_paper_by_hand():
    """Were every one of 8 * 5 * 4 states replayed by itself, it would cost 4 passes, and 1 under
    the reference: 800. But the branches share 5 first steps, which saves 35 rows of 5 passes, and
    in the first block 2 steps of each branch are settled: 16 rows that need no gradient.
    """
    config = configure("configs/longlive.py", PAPER)
    assert budget.of_rollout(config, 24, 49).passes == 5 * 24 + 5 * 9 * 25 == 1245
    learned, reference = (budget.of_replay(config, wanted) for wanted in (True, False))
    assert reference == Spent(passes_forward=160 - 35)
    assert learned.passes_backward == 2 * (160 - 35 - 16)
    assert learned.passes + reference.passes == 800 - 35 * 5 - 16 * 3
    whole = budget.of_iteration(config, latent_to_pixel, 1, 24)
    assert (whole.passes, whole.videos_scored) == (1245 + 577, 9)


def test_the_releases_replay_by_hand():
    """2 of 4 steps have a gradient, and 4 of 5 blocks write what the next one reads."""
    fields = {**PAPER, "replay.blocks": 0, "rollout.window_blocks": 5}
    config = configure("configs/longlive.py:release", fields)
    learned, reference = (budget.of_replay(config, wanted) for wanted in (True, False))
    assert learned.passes + reference.passes == 80 * 4 + 80 + 160 + 2 * (8 * 4)
    # Every other iteration the old policy is behind, and replays as the reference does.
    first, second = (budget.of_iteration(config, lambda frame: frame, i, 24) for i in (0, 1))
    assert second.passes - first.passes == reference.passes == 160 + 8 * 4


def test_prompt_switches_and_chunks_of_branches_by_hand():
    """A switch makes 12 frames anew, 4 blocks. Each chunk of 2 branches has the anchor again."""
    fields = {"video.switch_frames": (12, 24), "rollout.branches": 4, "rollout.branch_chunk": 2}
    config = configure("configs/tiny.py", fields)
    for pivot, shared, own in (5, 1, 1), (8, 2, 0), (9, 2, 0), (3, 0, 2):
        passes = 5 * pivot + 4 * shared + 6 * (5 * (12 - pivot) + 4 * own)
        assert budget.of_rollout(config, pivot, 12) == Spent(passes_forward=passes)


def test_the_first_iteration_measures_the_unit_of_tau():
    """It rolls out to the last replayed block, 3 from the pivot, and replays without gradient."""
    config = configure("configs/tiny.py", {"train.prompts_per_iteration": 3})
    first, second = (budget.of_iteration(config, lambda frame: frame, i, 5) for i in (0, 1))
    # One switch before the pivot; a row for each of 3 first steps and for 3 others of 8 branches.
    further = 5 * 5 + 4 + 9 * 5 * 3 + (3 + 8 * 3 * 3)
    assert (first.passes - second.passes, first.videos_scored) == (3 * further, 3 * 9)
    config = configure("configs/tiny.py", {"objective.tau_unit": "group_std"})
    assert len({budget.of_iteration(config, lambda frame: frame, i, 5) for i in (0, 1)}) == 1


def test_what_a_continued_run_may_change_changes_no_count():
    plain = configure("configs/tiny.py", {})
    changed = {"train.micro_batch": 2, "train.iterations": 1, "train.video_every": 1}
    changed |= {"eval.prompts": 4, "eval.scorer": "''"}
    other = configure("configs/tiny.py", changed)
    for iteration in 0, 1:
        one, two = (
            budget.of_iteration(config, lambda frame: frame, iteration, 6)
            for config in (plain, other)
        )
        assert one == two


def test_the_old_policy_is_replayed_where_a_loss_reads_it():
    """Off policy: once for each of the states that have a gradient, of 8 branches and 3 blocks."""
    for method, more in {"rwr": 0, "flow_grpo": 8 * 3 * 3, "nft": 8 * 3 * 4}.items():
        on, off = (
            budget.of_replay(configure(f"configs/tiny.py:{method}", fields), True).passes
            for fields in (
                {"train.rollouts_per_sync": 1, "train.old_decay": 0.0},
                {"train.rollouts_per_sync": 2},
            )
        )
        assert off - on == more


def test_a_context_that_states_no_rows_is_taken_to_replay_every_state_once(monkeypatch):
    monkeypatch.setitem(replay.CONTEXTS, "mine", replay.anchor_energies)
    config = configure("configs/tiny.py", {"replay.context": "mine"})
    assert budget.of_replay(config, False) == Spent(passes_forward=8 * 3 * 4)
    assert budget.of_replay(config, True).passes == 4 * 8 * 3 * 4


# ---------------------------------------------------------------- in the programs that run


def rows_of(jaxpr, out, times=1) -> int:
    """Rows of the network's last product in a traced program, its loops multiplied.

    Args:
      jaxpr: of the program.
      out: channels of its result: those of a token forward, those of the model backward.
      times: how often the program runs.
    """
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shape = equation.outvars[0].aval.shape
            if "head" in str(equation.source_info.name_stack) and shape[-1] == out:
                count += times * int(np.prod(shape[:-1]))
            continue
        inner = times * equation.params.get("length", 1)
        bodies = [rows_of(body, out, inner) for body in memory.bodies(equation)]
        count += max(bodies) if equation.primitive.name == "cond" and bodies else sum(bodies)
    return count


def traced(config, loop, *arguments) -> tuple[int, int]:
    """Blocks that pass forward and backward in the programs that a loop of the host calls."""
    model, video = config.model, config.video
    tokens = video.block_frames * video.height * video.width // np.prod(model.patch)
    jaxpr = jax.make_jaxpr(loop)(*arguments).jaxpr
    outs = model.channels * np.prod(model.patch), model.dim
    return tuple(rows_of(jaxpr, out) // tokens for out in outs)


RUNS = {
    "paper": ("configs/tiny.py", {}),
    "paper in chunks": ("configs/tiny.py", {"rollout.branch_chunk": 4, "replay.chunk": 5}),
    "release in chunks": (
        "configs/tiny.py:release",
        {"rollout.branch_chunk": 2, "replay.chunk": 7, "train.micro_batch": 2},
    ),
    "part of the steps": (
        "configs/tiny.py",
        {"replay.grad_steps": 3, "replay.blocks": 4, "rollout.perturbed_steps": 1},
    ),
    "all steps of the release": (
        "configs/tiny.py:release",
        {"replay.grad_steps": 4, "video.switch_frames": (18,)},
    ),
    "one drawn step": ("configs/tiny.py:cm_grpo", {"video.blocks": 8, "video.switch_frames": ()}),
}


@pytest.mark.parametrize("spec, fields", RUNS.values(), ids=RUNS)
def test_the_count_is_that_of_the_programs(spec, fields):
    """Of the rollout at the first and the last pivot, and of the replay with and without gradient.

    A replay in chunks runs the shared first steps of a block forward twice, as the count takes
    every row with a gradient to do.
    """
    config = configure(spec, {**SMALL, "train.prompts_per_iteration": 2, **fields})
    config = config_lib.override(config, ["--config.model.attention=xla"])
    iteration = memory.trace_iteration(config, jax.devices()[:1])
    run, explored = iteration.run, iteration.explored
    prompts, variables = config_lib.prompts_at_once(config), run.variables(iteration.state.lora)
    batch = dataclasses.replace(explored.batch, changed=np.ones_like(explored.batch.changed))
    drawn = jax.eval_shape(run.programs.draw, explored.noise.key, explored.noise.prompts, 30)
    for pivot in {run.pivots[0], run.pivots[-1]}:
        windows = windows_read(config, run.backbone.to_pixel, pivot)
        blocks = blocks_read(config, run.backbone.to_pixel, windows, pivot)

        def explore(variables, embeddings, noise, drawn, pivot=pivot, blocks=blocks):
            prompted = batch.replace(embeddings=embeddings)
            return rollout(run, variables, prompted, noise, drawn, pivot, blocks)

        found = traced(config, explore, variables, batch.embeddings, explored.noise, drawn)
        expected = budget.of_rollout(config, pivot, blocks) * prompts
        assert found == (expected.passes_forward, expected.passes_backward)

    arguments = iteration.state.lora, run.params, iteration.experience
    found = traced(config, run.programs.replay, *arguments, memory.shape((), bool))
    expected = budget.of_replay(config, True) * prompts
    rows = expected.passes_backward // budget.BACKWARD
    twice = config_lib.recorded_blocks(config) * prompts if config.replay.chunk else 0
    twice *= config.replay.context == "anchor"
    assert found == (expected.passes_forward - rows + twice, rows)
    plain = budget.of_replay(config, False) * prompts
    assert plain == Spent(passes_forward=expected.passes_forward - rows)


def test_a_budget_that_allows_no_iteration_is_an_error_that_says_what_one_takes():
    config = configure("configs/tiny.py", {"train.budget_passes": 99})
    run = memory.trace_iteration(config, jax.devices()[:1]).run
    with pytest.raises(UsageError, match=r"budget_passes=99: the first iteration takes \d{4}"):
        budget.limited(run)


# ---------------------------------------------------------------- methods at the paper's setting

# G 8, W 5, S 4. A state with gradient takes 4 passes, and 1 for each policy that it is compared
# with: first what is published or follows from it, then by what ours differs.
UPDATES = {
    # The branches share 5 first steps; 2 steps of the pivot are settled.
    "kvpo": 8 * 5 * 4 * 5 - (8 - 1) * 5 * 5 - 8 * 2 * 3,
    "chr_l2": 5 * 4 * 5,
    # In the pivot nothing is shared, and everything is settled.
    "noise_tve": 8 * 5 * 4 * 5 - (8 - 1) * 4 * 5 - 8 * 4 * 3,
    "noise_l2": 5 * 4 * 5,
    "chr_noise_tve": 8 * 5 * 4 * 5 - 8 * 2 * 3,
    "ar_copo": 2 * 4 * 4 * (4 + 1),  # 2 updates; both read the old policy
    "neighbor_grpo": 4 * 5 * 3 * 4 + 4 * 5 * 4,  # the last step is trained, too
    "flow_grpo": 8 * 5 * 3 * (4 + 1),
    "dance_grpo": 8 * 5 * 2 * 4,  # 60 % of 3 steps
    "cps_grpo": 8 * 5 * 3 * 4,
    "cm_grpo": 8 * 5 * 4,  # one step
    "nft": 8 * 5 * 4 * 6,
    "astrolabe": 8 * 5 * 6,  # one level
    "awm": 8 * 5 * 4 * 5,
    "rwr": 8 * 5 * 4 * 4,
}


@pytest.mark.parametrize("method", UPDATES)
def test_what_the_update_of_a_method_takes(method):
    """Beside a rollout that is the same for all: 24 blocks, and 25 of the anchor and 8 branches."""
    config = configure(f"configs/longlive.py:{method}", PAPER)
    whole = budget.of_iteration(config, latent_to_pixel, 1, 24)
    assert budget.of_rollout(config, 24, 49).passes == 1245
    assert whole.passes - 1245 == UPDATES[method]


def test_the_page_of_methods_says_what_updates_take():
    found = re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]+) \|", page("methods.md"), re.MULTILINE)
    assert {method: int(passes) for method, passes in found} == UPDATES


def page(name: str) -> str:
    return (Path(__file__).resolve().parents[1] / "docs" / name).read_text()


def test_every_method_but_the_ablations_of_kvpo_is_counted():
    """An ablation changes no choice of what is explored, what is replayed, or of the loss."""
    choices = {"rollout.explore", "replay.states", "objective.kind"}
    others = {name for name, fields in methods.METHODS.items() if choices & fields.keys()}
    assert UPDATES.keys() == {"kvpo", *others}
