"""KVPO training: Algorithm 1 of the paper, top to bottom in `train_and_evaluate`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jax.sharding import Mesh

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import checkpoint, flow, heldout, objective, replay, report, rollout, routing, sharding
from kvpo_jax.decoder import Decoder
from kvpo_jax.doctor import Doctor
from kvpo_jax.models.wan import Wan, init_variables, wan_config
from kvpo_jax.rewards import composite
from kvpo_jax.types import Array, PyTree, ReplayTuples, Scores, TextKV


@struct.dataclass
class TrainState:
    """What a run carries from one iteration to the next; all of it is in a checkpoint.

    Attributes:
      iteration: int32[], iterations done.
      lora: the policy that is trained (pi_theta).
      old: the policy that makes the rollouts (pi_old).
      reference: the frozen initial policy (pi_ref).
      ema: the average of lora over optimiser steps.
      optimiser: optax state.
    """

    iteration: Array
    lora: PyTree
    old: PyTree
    reference: PyTree
    ema: PyTree
    optimiser: optax.OptState


@struct.dataclass
class Experience:
    """A rollout with its rewards, as the update reads it.

    Attributes:
      tuples: ReplayTuples of P prompts.
      embeddings: float[P, M, K, text_dim].
      text: TextKV float[L, P, M, K, H, D], made by the policy of the rollout.
      advantages: float[P, G].
      safe: bool[P], whether a branch beats the anchor.
      energies_old: float[P, G] under pi_old; ignored where `on_policy`.
      energies_ref: float[P, G] under pi_ref.
      on_policy: bool[], theta equals old: the old energies are those of theta.
    """

    tuples: ReplayTuples
    embeddings: Array
    text: TextKV
    advantages: Array
    safe: Array
    energies_old: Array
    energies_ref: Array
    on_policy: Array


# ---------------------------------------------------------------- the update


def make_optimiser(train: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW on the LoRA tree: global-norm clip, linear warm-up, decoupled weight decay."""
    learning_rate = optax.linear_schedule(
        train.learning_rate / max(train.warmup, 1), train.learning_rate, max(train.warmup - 1, 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.adamw(learning_rate if train.warmup else train.learning_rate, weight_decay=train.weight_decay),
    )


def make_energies(config: ml_collections.ConfigDict, mesh: Mesh) -> Callable[..., Array]:
    """(params, lora, embeddings, text, tuples) -> energies float[P, G] of Eq. 5, sharded over the mesh.

    replay.text says whose text keys and values the replay reads: "policy" makes them anew with `lora`, so that LoRA
    on the text attention is trained like the rest; "rollout" takes `text` as it is (release).
    """
    if config.replay.text not in ("policy", "rollout"):
        raise ValueError(f"replay.text is {config.replay.text!r}; expected policy or rollout")
    model = Wan(wan_config(config))
    schedule = flow.schedule(
        config.sampler.steps, config.sampler.shift, config.sampler.solver, config.sampler.context_step
    )
    energies = replay.energies_function(config.replay)

    def policy(constants, lora):
        params, embeddings, text = constants
        variables = {"params": params, "lora": lora}
        if config.replay.text == "policy":
            text = rollout.encode_text(model, variables, embeddings)
        return partial(model.apply, variables), text

    def of_shard(params, lora, embeddings, text, tuples):
        constants = sharding.vary(params), embeddings, jax.tree.map(sharding.vary_over_branch, text)
        return energies(policy, config.replay, schedule, sharding.vary(lora), constants, tuples)

    one, prompts = sharding.REPLICATED, sharding.PROMPTS
    in_specs = (one, one, prompts, sharding.TEXT, sharding.replay_spec(config.window.sink, config.window.bank > 0))
    return sharding.shard(of_shard, mesh, in_specs=in_specs, out_specs=sharding.TRAJECTORIES)


@struct.dataclass
class Gradient:
    """Sums over the micro-batches of an optimiser step.

    Attributes:
      lora: gradient of the loss.
      safe: int32[], prompts whose gate is open.
      metrics: name -> float[].
    """

    lora: PyTree
    safe: Array
    metrics: dict[str, Array]


def make_gradient(config: ml_collections.ConfigDict, mesh: Mesh) -> Callable:
    """(lora, params, Experience) -> (Gradient, energies float[P, G] of theta): Eqs. 6-8, 15-16.

    Of a micro-batch, its share of the mean over all prompts of the iteration.
    """
    energies = make_energies(config, mesh)
    of_group = partial(objective.loss, config.objective)

    def loss(lora, params, experience):
        e = energies(params, lora, experience.embeddings, experience.text, experience.tuples)
        e = sharding.constrain(e, mesh)  # every device sees the G energies of a group
        of_groups = jax.vmap(partial(of_group, on_policy=experience.on_policy))
        value, diagnostics = of_groups(
            e, experience.energies_old, experience.energies_ref, experience.advantages, experience.safe
        )
        share = len(value) / config.train.prompts_per_iteration
        return share * jnp.mean(value), (share, diagnostics, e)

    # Without out_shardings the second call could see other placements than the first, and compile again; and every
    # process reads the energies.
    @partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, sharding.REPLICATED))
    def gradient(lora, params, experience):
        (value, (share, diagnostics, e)), grads = jax.value_and_grad(loss, has_aux=True)(lora, params, experience)
        metrics = {"loss": value, **{name: share * mean for name, mean in diagnostics.means().items()}}
        return Gradient(grads, jnp.sum(experience.safe), metrics), e

    return gradient


@partial(jax.jit, donate_argnums=0)
def accumulate(total: Gradient, share: Gradient) -> Gradient:
    """Their sum, in the place of `total`."""
    return jax.tree.map(jnp.add, total, share)


def make_apply(config: ml_collections.ConfigDict, mesh: Mesh, optimiser: optax.GradientTransformation) -> Callable:
    """(state, Gradient) -> (state, metrics): one optimiser step.

    Where the gate is closed for every prompt (config.objective.gate), LoRA and optimiser state stay as they are:
    a zero gradient alone would still let AdamW's momentum and decay move them.
    """

    @partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, sharding.REPLICATED))
    def apply(state, gradient):
        updates, optimiser_state = optimiser.update(gradient.lora, state.optimiser, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        skip = (gradient.safe == 0) & (config.objective.gate in ("zero", "mechanism_1"))
        keep = lambda new, before: jax.tree.map(lambda n, b: jnp.where(skip, b, n), new, before)
        lora, optimiser_state = keep(lora, state.lora), keep(optimiser_state, state.optimiser)
        metrics = {
            **gradient.metrics,
            "grad_norm": optax.global_norm(gradient.lora),
            "update_norm": optax.global_norm(jax.tree.map(jnp.subtract, lora, state.lora)),
            "lora_norm": optax.global_norm(lora),
            "skipped_update": skip.astype(jnp.float32),
        }
        ema = optax.incremental_update(lora, state.ema, 1 - config.train.ema_decay)
        return state.replace(lora=lora, ema=keep(ema, state.ema), optimiser=optimiser_state), metrics

    return apply


def experience_advantages(
    config: ml_collections.ConfigDict, scores: Scores, local: Scores | None, key: Array, first: int = 0
) -> Array:
    """Advantages float[P, G] of the configured kind, with the controls of the objective section applied.

    `first` is the number of the first prompt in its iteration.
    """
    advantages = objective.advantages(config.objective, config.reward.weights, scores, local)
    if config.objective.negate_advantages:
        advantages = -advantages
    if config.objective.shuffle_advantages:
        keys = jax.random.split(key, config.train.prompts_per_iteration)[first : first + len(advantages)]
        advantages = jax.vmap(jax.random.permutation)(keys, advantages)
    return advantages


# ---------------------------------------------------------------- the loop


def score(
    config: ml_collections.ConfigDict,
    backbone: backbone_lib.Backbone,
    sentences: Sequence[Sequence[str]],
    branches: Array,
    anchor: Array,
    pivot: int,
) -> tuple[Scores, Scores | None]:
    """Rewards of the whole videos and, where anchor-relative advantages need them, of the replayed blocks alone.

    branches [P, G, frames, h, w, 3] and anchor [P, frames, h, w, 3] are pixels.
    """
    whole = composite.score_rollout(
        backbone.rewards, branches, anchor, sentences, config.reward.weights, config.video.switch_frames,
        config.reward.clip_frames, backbone.to_pixel,
    )  # fmt: skip
    if config.objective.advantage != "anchor":
        return whole, None
    fork, end = (f * config.video.block_frames for f in (pivot, pivot + rollout.recorded_blocks(config)))
    segment = rollout.segment_of(fork, config.video.switch_frames)
    window = (backbone.to_pixel(fork), backbone.to_pixel(end))
    of_fork = [sequence[segment] for sequence in sentences]
    return whole, composite.score_window(backbone.rewards, branches, anchor, of_fork, config.reward.weights, window)


@struct.dataclass
class Group:
    """What is reported of a micro-batch.

    Attributes:
      scores: of its P groups.
      safe: bool[P], where the gate is open.
      energies: float[P, G], of the old policy.
      ratio_check: float[], how far the ratio of these energies and of the old policy's forward pass is from 1, where it
        is looked at.
      pixel_std: float[], of the branches of a group, the mean over pixels.
      clips: [1 + G, frames, h, w, 3], the anchor and the branches of the iteration's first prompt, where they are to be
        shown, in its first micro-batch and on the main process; there, of G, those that its own devices made.
      sentences: P sequences (static).
    """

    scores: Scores
    safe: Array
    energies: Array
    pixel_std: Array
    clips: np.ndarray | None
    sentences: tuple[tuple[str, ...], ...] = struct.field(pytree_node=False)
    ratio_check: Array | None = None


@jax.jit
def diversity(pixels: Array) -> Array:
    """The standard deviation over the branches of [P, G, frames, h, w, 3], the mean over pixels, float[].

    Exactly 0 where the branches are equal (`objective.spread`).
    """
    scale = 255.0 if pixels.dtype == jnp.uint8 else 1.0
    return jax.vmap(objective.spread)(pixels.astype(jnp.float32)).mean() / scale


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the groups of an iteration look like: rewards, win rate over the anchor, diversity, spread of energies."""

    def of(group: Group) -> dict[str, Array]:
        scores = group.scores
        spread = lambda values: jax.vmap(objective.spread)(jnp.asarray(values)).mean()
        return {
            "reward": scores.branches.mean(),
            "reward_anchor": scores.anchor.mean(),
            "reward_std_in_group": spread(scores.branches),
            "win_rate": (scores.branches > scores.anchor[:, None]).mean(),
            "pixel_std_in_group": group.pixel_std,
            "gate_open": group.safe.mean(),
            "energy_old_std_in_group": spread(group.energies),
            **{f"reward_{name}": branches.mean() for name, (branches, _) in scores.components.items()},
        }

    rows = [of(group) for group in groups]
    checks = [{"ratio_check": float(group.ratio_check)} for group in groups if group.ratio_check is not None]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | (checks[0] if checks else {})


def check_finite(
    metrics: Mapping[str, Array], energies: Mapping[str, Array], sentences: Sequence[Sequence[str]]
) -> None:
    """FloatingPointError that names what is not finite: policy, prompt and branch of an energy, or the gradient.

    `energies` are those of some policies, float[P, G] each, `sentences` the P prompts.
    """
    for policy, values in energies.items():
        values = np.asarray(values)
        for prompt, branch in np.argwhere(~np.isfinite(values))[:1]:
            raise FloatingPointError(
                f"the energy of branch {branch} of prompt {sentences[prompt]} is {values[prompt, branch]} under the "
                f"{policy} policy"
            )
    for name in ("loss", "grad_norm"):
        if name in metrics and not np.isfinite(metrics[name]):
            raise FloatingPointError(f"{name} is {metrics[name]} though every energy is finite")


def count(tree: PyTree) -> int:
    """Numbers in a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def prompt_indices(config: ml_collections.ConfigDict, iteration: int) -> range:
    """Positions in the stream of training prompts that an iteration reads."""
    prompts = config.train.prompts_per_iteration
    return range(iteration * prompts, (iteration + 1) * prompts)


def draw_pivot(config: ml_collections.ConfigDict, iteration: int) -> int:
    """The first perturbed block of an iteration, uniform over the eligible ones; one for all prompts."""
    pivots = routing.eligible_pivots(
        routing.window(config), config.video.blocks, config.video.block_frames, rollout.recorded_blocks(config),
        config.video.switch_frames,
    )  # fmt: skip
    return pivots[int(jax.random.randint(rollout.stream(config.seed, "pivot", iteration), (), 0, len(pivots)))]


def init_state(
    config: ml_collections.ConfigDict, optimiser: optax.GradientTransformation, mesh: Mesh, lora: PyTree | None = None
) -> TrainState:
    """The state before the first iteration: every policy is `lora`, or a fresh one, which changes nothing."""
    if lora is None:
        fresh = jax.jit(lambda key: init_variables(wan_config(config), key)["lora"])
        lora = fresh(rollout.stream(config.seed, "lora", 0))
    copy = lambda: jax.tree.map(jnp.copy, lora)
    state = TrainState(jnp.zeros((), jnp.int32), lora, copy(), copy(), copy(), optimiser.init(lora))
    return sharding.place(state, mesh)


def newest_state(workdir: Path, like: TrainState) -> tuple[int, TrainState]:
    """Iterations done and state of a run's newest checkpoint, as `like` (see `checkpoint.restore_latest`), to read.

    Raises:
      ValueError: there is none yet.
    """
    with checkpoint.reader(workdir / "checkpoints") as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, like)
    if restored is None:
        raise ValueError(f"{workdir / 'checkpoints'} has no checkpoint yet")
    return restored[:2]


def pictured(config: ml_collections.ConfigDict, iteration: int) -> bool:
    """Whether the branches of an iteration, numbered from 0, are shown: the first, the last, every `video_every`-th."""
    done, every = iteration + 1, config.train.video_every
    return every > 0 and (done in (1, config.train.iterations) or done % every == 0)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path | str, profile: bool = False) -> dict:
    """Aligns the configured generator and reports held-out rewards before and after.

    Every process of a run calls it; the main one writes and prints.

    Args:
      config: see configs/tiny.py.
      workdir: run directory, the same for all processes; if it holds checkpoints, the newest is continued, bit for bit
        as if never stopped.
      profile: leaves a trace of one iteration in workdir/profile.

    Returns:
      What summary.json holds; nothing where the run is stopped, or on processes other than the main one.

    Raises:
      FloatingPointError: a reward, energy or gradient is not finite; the last good state has been saved.
    """
    workdir = Path(workdir)
    clock = Clock()
    prompts_at_once, branches_at_once = rollout.prompts_at_once(config), rollout.branches_at_once(config)
    mesh = rollout.make_mesh(config)
    heldout.batch_size(config, mesh)  # whatever cannot be evaluated is said before anything is loaded
    replicated = jax.sharding.NamedSharding(mesh, sharding.REPLICATED)
    backbone = backbone_lib.load(config)
    params = backbone.load(replicated)
    stages = rollout.build(config, mesh)
    optimiser = make_optimiser(config.train)
    energies = jax.jit(make_energies(config, mesh), out_shardings=replicated)
    gradient, apply = make_gradient(config, mesh), make_apply(config, mesh, optimiser)
    of_group = partial(objective.ratio_deviation, tau=config.objective.tau, unit=config.objective.tau_unit)
    ratio_check = jax.jit(jax.vmap(of_group))
    decoder = Decoder(backbone, mesh, config.video.block_frames)

    checkpoints = checkpoint.manager(workdir / "checkpoints", config.train.keep)
    state = init_state(config, optimiser, mesh, backbone.load_lora(None))
    if (restored := checkpoint.restore_latest(checkpoints, state)) is not None:
        _, state, extra = restored
        clock.add(extra["seconds"])
    iteration, main = int(state.iteration), sharding.is_main()
    if main:
        writer = report.MetricWriter(workdir, iteration)
        progress, doctor = report.Progress(config.train.iterations), Doctor(config)
        print(
            f"{config.backbone}: {count(params):,} parameters, {count(state.lora):,} in LoRA; "
            f"{sharding.describe(mesh, prompts_at_once, branches_at_once)}; "
            f"iteration {iteration} of {config.train.iterations}",
            flush=True,
        )

    def explore(state: TrainState, iteration: int, first: int, on_policy: bool) -> tuple[Experience, Group]:
        """Steps 1 to 3 for the prompts from `first` on, and the energies that do not change in the epochs."""
        key = partial(rollout.stream, config.seed, step=iteration)
        numbers = np.arange(first, first + prompts_at_once)

        # Step 1: CHR-based exploration with the old policy, and step 2: what the replay needs of it.
        with clock.time("rollout"):
            start = prompt_indices(config, iteration)[0]
            batch = heldout.prompt_batch(backbone, mesh, "train", [start + int(n) for n in numbers])
            pivot = draw_pivot(config, iteration)
            behaviour = {"params": params, "lora": state.old}
            text = stages.encode_text(behaviour, batch.embeddings)
            selected = stages.draw(key(name="routing"), jnp.asarray(numbers), pivot * config.video.block_frames)
            noise = rollout.NoiseKey(key(name="noise"), jnp.asarray(numbers))
            videos = jax.block_until_ready(
                rollout.rollout(stages, config, mesh, behaviour, text, batch.changed, noise, selected, pivot)
            )

        # Step 3: rewards and group-normalised advantages.
        with clock.time("reward"):
            branches, anchor = decoder.group(videos.branches, videos.anchor, pivot)
            pixel_std = diversity(branches)
            branches, anchor = sharding.own_part(branches), sharding.own_part(anchor)[:, 0]
            sentences = [batch.sentences[i] for i in sharding.own_prompts(mesh, prompts_at_once)]
            of_own = partial(score, config, backbone, sentences, branches, anchor, pivot)
            scores, local = sharding.gather(of_own, mesh)
            heldout.release(config, backbone)
            advantages = experience_advantages(config, scores, local, key(name="shuffle"), first)
            safe = objective.safe(scores, local)

        with clock.time("update"):
            replayed = (batch.embeddings, text, videos.replay)
            reference = energies(params, state.reference, *replayed)
            experience = Experience(
                tuples=videos.replay, embeddings=batch.embeddings, text=text, advantages=advantages, safe=safe,
                energies_old=reference if on_policy else energies(params, state.old, *replayed),
                energies_ref=reference, on_policy=jnp.asarray(on_policy),
            )  # fmt: skip
        # Gigabytes at full size, so they leave the devices only to be shown.
        shown = main and first == 0 and pictured(config, iteration)
        clips = np.concatenate([anchor[:1], branches[0]]) if shown else None
        return experience, Group(scores, safe, reference, pixel_std, clips, batch.sentences)

    def learn(
        state: TrainState, experience: Experience, sentences: Sequence[Sequence[str]], total: Gradient | None
    ) -> tuple[Gradient, Array]:
        """Step 4, the replay under the unperturbed context: the gradient so far, and the old policy's energies."""
        share, current = gradient(state.lora, params, experience)
        old = current if experience.on_policy else experience.energies_old
        total = share if total is None else accumulate(total, share)
        named = {"trained": current, "old": old, "reference": experience.energies_ref}
        check_finite(total.metrics, named, sentences)
        return total, old

    def explore_and_learn(
        state: TrainState, iteration: int, first: int, on_policy: bool, total: Gradient | None
    ) -> tuple[Gradient, Group, Experience | None]:
        """Steps 1 to 4 for some prompts. Their experience is gigabytes: it is returned for further epochs only."""
        experience, group = explore(state, iteration, first, on_policy)
        with clock.time("update"):
            total, old = learn(state, experience, group.sentences, total)
            if (iteration, first) == (0, 0):
                # On policy, the gradient takes its own energies for those of the old one: once, whether they are.
                forward = energies(params, state.old, experience.embeddings, experience.text, experience.tuples)
                group = group.replace(ratio_check=ratio_check(old, forward).max())
            again = experience.replace(energies_old=old, on_policy=jnp.asarray(False))
        return total, group.replace(energies=old), again if config.train.epochs > 1 else None

    def improve(state: TrainState, iteration: int, on_policy: bool) -> tuple[TrainState, dict[str, Array], list[Group]]:
        """An iteration: the new state, the metrics of its last update, and what its micro-batches looked like."""
        total, groups, kept = None, [], []
        for first in range(0, config.train.prompts_per_iteration, prompts_at_once):
            total, group, experience = explore_and_learn(state, iteration, first, on_policy, total)
            groups.append(group)
            kept.append(experience)

        # Step 5: the PPO-KL update; in further epochs steps 4 and 5 again.
        with clock.time("update"):
            for epoch in range(config.train.epochs):
                if epoch:
                    total = None
                    for group, experience in zip(groups, kept, strict=True):
                        total, _ = learn(state, experience, group.sentences, total)
                state, metrics = apply(state, total)
                check_finite(metrics, {}, ())
        return state, metrics, groups

    def evaluation(lora: PyTree) -> heldout.Heldout:
        with clock.time("evaluation"):
            return heldout.evaluate(config, backbone, mesh, stages, decoder, {"params": params, "lora": lora})

    def save(state: TrainState) -> None:
        checkpoint.save(checkpoints, int(state.iteration), state, {"seconds": clock.seconds})

    before = evaluation(state.reference)
    online = ema = None  # evaluations of the state's policies, where there are any
    with terminated() as stop, saved_on_error(checkpoints, lambda: save(good)):
        for _ in until_stopped(iteration, config.train.iterations, stop, profile and workdir / "profile"):
            good, online, ema = state, None, None
            on_policy = iteration % config.train.rollouts_per_sync == 0

            updated, metrics, groups = improve(state, iteration, on_policy)
            with clock.time("update"):
                iteration += 1
                synced = iteration % config.train.rollouts_per_sync == 0
                state = updated.replace(
                    iteration=sharding.place(jnp.asarray(iteration, jnp.int32), mesh),
                    old=updated.lora if synced else updated.old,
                )

            metrics = {**jax.device_get(metrics), **group_metrics(groups), "pivot": draw_pivot(config, iteration - 1)}
            last = iteration == config.train.iterations
            if last or (config.eval.every and iteration % config.eval.every == 0):
                online, ema = evaluation(state.lora), evaluation(state.ema)
                metrics |= {"heldout_reference": before.reward.mean(), "heldout_online": online.reward.mean()}
                metrics |= {"heldout_ema": ema.reward.mean()}
            metrics |= {f"seconds_{name}": value for name, value in clock.lap().items()}
            if main:
                writer.write(iteration - 1, metrics)
                progress.line(iteration - 1, metrics)
                for line in doctor.visit(metrics):
                    print(line, flush=True)
                if groups[0].clips is not None:
                    names = ("anchor", *(f"branch {g}" for g in range(config.rollout.branches)))
                    writer.write_videos(iteration - 1, "branches", list(zip(names, groups[0].clips, strict=False)))
            if last or iteration % config.train.checkpoint_every == 0:
                save(state)
        if iteration < config.train.iterations:
            save(state)
    checkpoints.wait_until_finished()
    checkpoints.close()
    if main:
        writer.close()
    if iteration < config.train.iterations:
        if main:
            print(f"stopped after iteration {iteration}; continue with --workdir={workdir}", flush=True)
        return {}

    online, ema = online or evaluation(state.lora), ema or evaluation(state.ema)
    return report.finish(workdir, config, backbone, before, online, ema, clock.seconds) if main else {}


def until_stopped(first: int, end: int, stop: threading.Event, profile: Path | None) -> Iterator[int]:
    """first ... end - 1, until SIGTERM has reached a process; a trace of the third or else the last goes to `profile`.

    The first iteration of a process compiles, the second may still read what was compiled from disk.
    """
    traced = min(first + 2, end - 1)
    for number in range(first, end):
        if sharding.any_process(stop.is_set()):
            return
        with jax.profiler.trace(profile) if profile and number == traced and sharding.is_main() else nullcontext():
            yield number


@contextmanager
def saved_on_error(checkpoints: ocp.CheckpointManager, save: Callable[[], None]):
    """Saves the last good state before a FloatingPointError leaves the loop."""
    try:
        yield
    except FloatingPointError:
        save()
        checkpoints.wait_until_finished()
        raise


@contextmanager
def terminated():
    """A threading.Event that SIGTERM sets, so that the loop can save and leave."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(
            signal.SIGTERM, previous or signal.SIG_DFL
        )  # None: that of jax.distributed, which is not Python's


class Clock:
    """Seconds of a run by stage, over all the processes that it took; `compile` is counted apart from its stage."""

    def __init__(self):
        self._before, self._stages, self._begin, self._compiling = {}, {}, time.monotonic(), 0.0
        self._lap = {}
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_) -> None:
        # Not the tracing, which is told once for every function within a function.
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            self._compiling += seconds

    def add(self, seconds: dict[str, float]) -> None:
        """Counts the seconds of an earlier process."""
        self._before = dict(seconds)

    @contextmanager
    def time(self, stage: str):
        """Counts what runs inside to a stage."""
        begin, compiling = time.monotonic(), self._compiling
        yield
        spent = time.monotonic() - begin - (self._compiling - compiling)
        self._stages[stage] = self._stages.get(stage, 0.0) + spent

    def lap(self) -> dict[str, float]:
        """Seconds of every stage since the last lap."""
        now = {**self._stages, "compile": self._compiling}
        lap = {name: value - self._lap.get(name, 0.0) for name, value in now.items()}
        self._lap = now
        return lap

    @property
    def seconds(self) -> dict[str, float]:
        """Total, compile, and every stage."""
        now = {"total": time.monotonic() - self._begin, "compile": self._compiling, **self._stages}
        return {name: value + self._before.get(name, 0.0) for name, value in now.items()}
