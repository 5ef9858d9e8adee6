"""KVPO training: Algorithm 1 of the paper, its steps as functions and then the loop.

explore   steps 1 and 2   anchor and branches by Causal History Routing, states for the replay
judge     step 3          rewards, advantages, anchor gate
remember  step 4          the energies that do not change: pi_old and pi_ref
learn     step 4          the energies of pi_theta and the gradient
improve   steps 1 to 5    one iteration
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import budget, fitting
from kvpo_jax import run as run_lib
from kvpo_jax.algorithm import keys, objective
from kvpo_jax.errors import DivergedError
from kvpo_jax.evaluate import (
    Heldout,
    drawn,
    evaluate,
    finish,
    heldout_metrics,
    heldout_record,
    kept_reference,
)
from kvpo_jax.rollout import rollout
from kvpo_jax.run import Run
from kvpo_jax.runtime import checkpoint, progress, sharding
from kvpo_jax.runtime.config import (
    check_trained,
    compares_energies,
    has_energy_unit,
    is_on_policy,
    is_pictured,
    is_synced,
    micro_batches,
    old_decay,
    replays_old,
    rolls_ahead,
)
from kvpo_jax.runtime.metrics import Group, Recorder, check_finite, group_metrics
from kvpo_jax.runtime.process import Clock, saved_on_error, stop_signal, until_stopped
from kvpo_jax.state import TrainState, init_state, policy_of
from kvpo_jax.types import (
    Array,
    Experience,
    Gradient,
    Judged,
    PromptBatch,
    PyTree,
    Replayed,
    Rollout,
    Windows,
)

# ---------------------------------------------------------------- Algorithm 1


def explore(
    run: Run, lora: PyTree, batch: PromptBatch, iteration: int, pivot: int, windows: Windows
) -> Rollout:
    """Steps 1 and 2: anchor and branches of P prompts, by the policy with this LoRA tree.

    Args:
      run: of the iteration.
      lora: of the policy.
      batch: the prompts.
      iteration: whose draws and noise.
      pivot: the first perturbed block.
      windows: pixel frames [start, end) that are going to be read. Blocks are made up to the last
        that is read or replayed.

    Raises:
      DivergedError: the videos are not finite.
    """
    blocks = backbone_lib.blocks_read(run.config, run.backbone.to_pixel, windows, pivot)
    seed, fork_frame = run.config.seed, pivot * run.config.video.block_frames
    routing_key = keys.draw_key(seed, "routing", iteration)
    routed_frames = run.programs.draw(routing_key, batch.numbers, fork_frame)
    noise = keys.NoiseKey(keys.draw_key(seed, "noise", iteration), batch.numbers)
    rolled = rollout(run, run.variables(lora), batch, noise, routed_frames, pivot, blocks)
    if not run.programs.all_finite((rolled.branches, rolled.anchor)):
        fault = (
            "the policy has diverged; start again with a lower config.train.learning_rate="
            f"{run.config.train.learning_rate}"
            if iteration
            else "the weights are at fault, or the LoRA that training starts from"
        )
        raise DivergedError(f"the videos of iteration {iteration + 1} are not finite: {fault}")
    return jax.block_until_ready(rolled)


def judge(
    run: Run, rolled: Rollout, batch: PromptBatch, iteration: int, pivot: int
) -> Callable[[], Judged]:
    """Step 3: rewards of the videos, advantages, and the anchor gate.

    Arguments as those of `explore`.

    Returns:
      () -> what step 3 makes, which waits for reward servers. All other scores are there already:
      it needs neither the rollout nor its videos.
    """
    config = run.config
    windows = backbone_lib.windows_read(config, run.backbone.to_pixel, pivot)
    pixels = run.decoder.group(rolled.branches, rolled.anchor, pivot, windows)
    count = backbone_lib.scored_frames(config, run.backbone.to_pixel)
    pixel_std = run.programs.pixel_std(pixels.videos, count)
    pixels = jax.tree.map(sharding.own_part, pixels)
    own = sharding.own_prompts(run.mesh, len(batch.sentences))
    sentences = [batch.sentences[i] for i in own]
    answers = sharding.together(
        lambda: backbone_lib.ask_group(config, run.backbone, sentences, pixels, pivot)
    )
    looks = run.programs.appearance(pixels.videos, count)
    backbone_lib.release_rewards(config, run.backbone)

    def judged() -> Judged:
        scores, local, appearance = sharding.gather(lambda: (*answers(), looks), run.mesh)
        if config.reward.noise:
            key = keys.draw_key(config.seed, "reward", iteration)
            scores, local = jax.device_get(run.programs.err(scores, local, key, batch.numbers))
        key = keys.draw_key(config.seed, "shuffle", iteration)
        advantages, gate_open = run.programs.judge(scores, local, key, batch.numbers)
        return Judged(
            scores=scores,
            advantages=advantages,
            gate_open=gate_open,
            pixel_std=pixel_std,
            appearance=appearance,
        )

    return judged


def remember(
    run: Run,
    state: TrainState,
    rolled: Rollout,
    batch: PromptBatch,
    judged: Judged,
    on_policy: bool,
) -> Experience:
    """Step 4, what does not change in the epochs: the energies under pi_ref and pi_old.

    A loss that is taken state by state reads their velocities instead, where it needs them.
    """
    experience = unjudged(run, state, rolled, batch, on_policy).replace(
        advantages=np.asarray(judged.advantages), gate_open=np.asarray(judged.gate_open)
    )
    if not compares_energies(run.config):
        return experience.replace(
            old=state.old if replays_old(run.config) else None,
            reference=state.reference if run.config.objective.beta else None,
        )
    reference = energies(run, state.reference, experience)
    return experience.replace(
        energies_old=reference if on_policy else energies(run, state.old, experience),
        energies_ref=reference,
    )


def unjudged(
    run: Run, state: TrainState, rolled: Rollout, batch: PromptBatch, on_policy: bool
) -> Experience:
    """A rollout as the replay reads it; advantages, gates and energies are 0 until known."""
    groups = rolled.replay.z.shape[:2]
    zeros = sharding.place(np.zeros(groups, np.float32), run.mesh)
    return Experience(
        tuples=rolled.replay,
        embeddings=batch.embeddings,
        text=rolled.text,
        advantages=np.zeros(groups, np.float32),
        gate_open=np.zeros(groups[0], bool),
        energies_old=zeros,
        energies_ref=zeros,
        energy_unit=state.energy_unit,
        on_policy=np.asarray(on_policy),
    )


def energies(run: Run, lora: PyTree, experience: Experience) -> Array:
    """float[P, G] of Eq. 5 under the policy with this LoRA tree."""
    return run.programs.replay(lora, run.params, experience, np.asarray(False))[1].energies


def learn(
    run: Run,
    lora: PyTree,
    experience: Experience,
    sentences: Sequence[Sequence[str]],
    total: Gradient | None,
) -> tuple[Gradient, Replayed]:
    """Step 4: the replay under the unperturbed context, and the gradient of Eq. 16.

    Returns:
      `total` with this micro-batch's share of the gradient, and what the replay says of the policy.

    Raises:
      NotFiniteError: an energy or the loss is not finite; it names prompt and branch.
    """
    share, replayed = run.programs.replay(lora, run.params, experience, np.asarray(True))
    total = share if total is None else run.programs.accumulate(total, share)
    old = replayed.energies if experience.on_policy else experience.energies_old
    named = {"trained": replayed.energies, "old": old, "reference": experience.energies_ref}
    check_finite(total.metrics, named, sentences)
    return total, replayed


def apply(
    run: Run, state: TrainState, gradient: Gradient | None
) -> tuple[TrainState, dict[str, Array]]:
    """Step 5, the PPO-KL update: the new state and its metrics.

    Raises:
      NotFiniteError: the loss, the gradient or the new state is not finite.
    """
    assert gradient is not None, "an iteration has at least one prompt"
    updated, metrics = run.programs.apply(state, gradient)
    check_finite(metrics, {}, ())
    # Of what it leaves as it is, the program returns copies.
    return updated.replace(old=state.old, reference=state.reference), metrics


class Asked(NamedTuple):
    """Some prompts of an iteration whose videos are with the scorers.

    Attributes:
      batch: the prompts.
      rolled: their rollout.
      judged: () -> their rewards, which are waited for.
      films: of the first prompt, where they are shown.
    """

    batch: PromptBatch
    rolled: Rollout
    judged: Callable[[], Judged]
    films: np.ndarray | None


def explore_and_ask(
    run: Run, state: TrainState, iteration: int, numbers: np.ndarray, clock: Clock
) -> Asked:
    """Steps 1 to 3 for some prompts of an iteration, without the scores of reward servers.

    A function of its own, so that videos are freed before anything else is made.
    """
    config, pivot = run.config, run.draw_pivot(iteration)
    filmed = numbers[0] == 0 and is_pictured(config, iteration)
    with clock.time("rollout"):
        batch = prompts_of(run, iteration, numbers)
        windows = backbone_lib.windows_read(config, run.backbone.to_pixel, pivot, whole=filmed)
        rolled = explore(run, state.old, batch, iteration, pivot, windows)
    with clock.time("reward"):
        judged = judge(run, rolled, batch, iteration, pivot)
    films = None
    if filmed:
        with clock.time("videos"):
            films = run.decoder.group_films(rolled.branches, rolled.anchor, pivot)
    return Asked(batch, rolled, judged, films)


def learn_from(
    run: Run, state: TrainState, iteration: int, asked: Asked, total: Gradient | None, clock: Clock
) -> tuple[Gradient, Group, Experience | None]:
    """Step 4 for some prompts of an iteration, once their rewards are there.

    A function of its own, so that a rollout is freed before the next: no caller may keep `asked`.
    The experience, gigabytes at full size, is returned for further epochs only.
    """
    on_policy, compares = is_on_policy(run.config, iteration), compares_energies(run.config)
    batch, rolled, answers, films = asked
    del asked
    with clock.time("reward"):
        judged = answers()
    with clock.time("update"), progress.bar("replay"):
        experience = remember(run, state, rolled, batch, judged, on_policy)
        routed_frames = rolled.routed_frames
        del rolled  # the latents; the experience keeps what the replay needs
        total, replayed = learn(run, state.lora, experience, batch.sentences, total)
        old = replayed.energies if on_policy else experience.energies_old
        group = Group(
            judged=judged,
            routed_frames=routed_frames,
            energies_old=old,
            energies_ref=experience.energies_ref,
            replayed=replayed,
            sentences=batch.sentences,
            films=films,
        )
        if run.config.train.epochs == 1:
            return total, group, None
        again = experience.replace(on_policy=np.asarray(False))
        return total, group, again.replace(energies_old=old) if compares else again


def prompts_of(run: Run, iteration: int, numbers: np.ndarray) -> PromptBatch:
    """Some of the training prompts of an iteration."""
    start = iteration * run.config.train.prompts_per_iteration
    return backbone_lib.prompt_batch(run.backbone, run.mesh, "train", start, numbers)


def calibrate(run: Run, state: TrainState, clock: Clock) -> TrainState:
    """The state with the unit of tau that the first iteration needs.

    It is the spread of that iteration's own energies. They are known only when all its
    micro-batches have been rolled out, so these are rolled out once more than they are learnt from.
    """

    def of(numbers: np.ndarray) -> np.ndarray:  # so that a rollout is freed before the next
        with clock.time("rollout"):
            batch = prompts_of(run, 0, numbers)
            rolled = explore(run, state.old, batch, 0, run.draw_pivot(0), windows=())
        with clock.time("update"), progress.bar("energies"):
            experience = unjudged(run, state, rolled, batch, on_policy=True)
            return np.asarray(energies(run, state.old, experience))

    old = np.concatenate([of(numbers) for numbers in micro_batches(run.config)])
    spread = np.asarray(objective.mean_spread(old))
    return state.replace(energy_unit=sharding.place(spread, run.mesh))


def improve(
    run: Run, state: TrainState, iteration: int, clock: Clock
) -> tuple[TrainState, dict[str, Array], list[Group]]:
    """One iteration of Algorithm 1.

    Returns:
      The new state, the metrics of its last update, and what its micro-batches looked like.
    """
    if iteration == 0 and has_energy_unit(run.config):
        state = calibrate(run, state, clock)
    total: Gradient | None = None
    groups: list[Group] = []
    kept: list[Experience] = []  # empty unless there are further epochs
    batches, ahead = list(micro_batches(run.config)), rolls_ahead(run.config)
    waiting: deque[Asked] = deque()  # for reward servers
    for turn in range(len(batches) + ahead):
        if turn < len(batches):
            waiting.append(explore_and_ask(run, state, iteration, batches[turn], clock))
        if turn >= ahead:
            total, group, experience = learn_from(
                run, state, iteration, waiting.popleft(), total, clock
            )
            groups.append(group)
            kept += [] if experience is None else [experience]

    with clock.time("update"):
        updated, metrics = apply(run, state, total)
        for _ in range(1, run.config.train.epochs):
            total = None
            for i, again in enumerate(kept):
                total, replayed = learn(run, updated.lora, again, groups[i].sentences, total)
                groups[i] = groups[i].replace(replayed=replayed)
            updated, metrics = apply(run, updated, total)

        energies_old = np.concatenate([np.asarray(group.energies_old) for group in groups])
        spread = objective.mean_spread(energies_old)
        unit = objective.next_unit(np.asarray(state.energy_unit), spread)
        done = iteration + 1
        updated = updated.replace(
            iteration=sharding.place(np.asarray(done, np.int32), run.mesh),
            energy_unit=sharding.place(np.asarray(unit), run.mesh),
        )
        if is_synced(run.config, done):
            decay = np.asarray(old_decay(run.config, done), np.float32)
            old = run.programs.follow(updated.old, updated.lora, decay) if decay else updated.lora
            updated = updated.replace(old=old)  # pi_old <- pi_theta
    return updated, metrics, groups


# ---------------------------------------------------------------- the loop


def evaluation(
    run: Run, state: TrainState, policy: str, clock: Clock, recorder: Recorder | None
) -> Heldout:
    """The evaluation of the state's policy of this name; the recorder writes its videos."""
    done = 0 if policy == "reference" else int(state.iteration)
    film = partial(recorder.film_heldout, done, policy) if recorder else lambda *_: None
    with clock.time("evaluation"):
        made = evaluate(run, policy_of(state, policy), film)
    if recorder and not done:
        recorder.flush()  # the scores are going to be kept, and the videos not made again
    return made


def evaluated(
    run: Run, state: TrainState, reference: Heldout, clock: Clock, recorder: Recorder | None
) -> dict[str, Heldout]:
    """The evaluations of the reference, the online and the EMA policy, which are recorded."""
    results = {"reference": reference}
    for policy in ("online", "ema"):
        results[policy] = evaluation(run, state, policy, clock, recorder)
    if recorder:
        picture = np.asarray(drawn(run, results))
        recorder.record_heldout(int(state.iteration), heldout_record(run, results), picture)
    return results


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: Path | str, profile: bool = False
) -> dict[str, Any] | None:
    """Aligns the configured generator and reports held-out rewards before and after.

    Every process of a run calls it; the main one writes and prints.

    Args:
      config: see configs/tiny.py.
      workdir: run directory, the same for all processes; if it holds checkpoints, the newest is
        continued, bit for bit as if never stopped.
      profile: leaves a trace of one iteration in workdir/profile.

    Returns:
      What summary.json holds, which is nothing on processes other than the main one; None if the
      run is stopped.

    Raises:
      NotFiniteError: a reward, energy or gradient is not finite; the last good state has been
        saved.
    """
    check_trained(config)
    return train(budget.limited(run_lib.load(fitting.fitted(config))), Path(workdir), profile)


def train(run: Run, workdir: Path, profile: bool = False) -> dict[str, Any] | None:
    """`train_and_evaluate` with equipment that is assembled already."""
    config, clock = run.config, Clock()
    checkpoints = checkpoint.manager(
        workdir / "checkpoints", config.train.keep, config.train.keep_best
    )
    with progress.bar("reading the newest checkpoint"):
        state = init_state(config, run.mesh, run.initial_lora())
        if (restored := checkpoint.restore_latest(checkpoints, state)) is not None:
            _, state, extra = restored
            clock.add(extra["seconds"])
    first, iterations = int(state.iteration), config.train.iterations
    spent = budget.of_first(run, first)
    recorder = None
    if sharding.is_main():
        recorder = Recorder(config, workdir, first, run.backbone.fps)
        progress.say(f"{run.describe(state.lora)}; iteration {first} of {iterations}")

    def save(state: TrainState, results: Mapping[str, Heldout] | None = None) -> None:
        extra = {"seconds": clock.seconds, "config": config.to_dict(), "files": run.files}
        reward = None if results is None else float(results["online"].reward.mean())
        checkpoint.save(checkpoints, int(state.iteration), state, extra, reward)

    def save_good() -> None:
        checkpoint.forget_after(checkpoints, int(good.iteration))
        if int(good.iteration):  # before that nothing is lost, and the configuration may change
            save(good)

    # Of evaluating the state's policies, if that has been done.
    results: dict[str, Heldout] | None = None
    # The last state whose update was finite, and on the host the one before it, which may be the
    # last that makes finite videos.
    good = state
    with (
        progress.bar("training", iterations, steady=False) as advance,
        stop_signal() as stop,
        saved_on_error(checkpoints, save_good),
    ):
        advance(first)
        made = partial(evaluation, run, state, "reference", clock, recorder)
        before = kept_reference(run, workdir, made)
        trace = workdir / "profile" if profile else None
        for iteration in until_stopped(first, iterations, stop, trace):
            before_good, good = sharding.on_host(good, state), state
            try:
                state, metrics, groups = improve(run, state, iteration, clock)
            except DivergedError:
                good = before_good()
                raise
            record = {**jax.device_get(metrics), **group_metrics(groups, run.programs.group_means)}
            record["pivot"] = run.draw_pivot(iteration)
            spent += budget.of_next(run, iteration)
            record |= spent.metrics()
            if run.backbone.rewards.waits and not config.reward.http.required:
                record["reward_missing"] = sharding.total(run.backbone.rewards.missing())
            results = None
            done, last = iteration + 1, iteration + 1 == iterations
            if last or (config.eval.every and done % config.eval.every == 0):
                results = evaluated(run, state, before, clock, recorder)
                record |= heldout_metrics(**results, first_pivot=run.pivots[0])
            record |= {f"seconds_{name}": value for name, value in clock.lap().items()}
            record["seconds_total"] = clock.seconds["total"]
            if recorder:
                recorder.record(iteration, record, groups)
            advance()
            checkpoint.look_after(checkpoints)
            choice = results is not None and config.train.keep_best > 0
            if last or choice or done % config.train.checkpoint_every == 0:
                save(state, results)
        if int(state.iteration) < iterations:
            save(state, results)
    checkpoints.close()
    if (done := int(state.iteration)) < iterations:
        if recorder:
            recorder.close()
            print(f"stopped after iteration {done}; continue with --workdir={workdir}", flush=True)
        return None

    results = results or evaluated(run, state, before, clock, recorder)
    if not recorder:
        return {}
    recorder.close()
    return finish(run, workdir, results, clock.seconds, done)
