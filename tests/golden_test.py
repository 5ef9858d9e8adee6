"""The released semantics: our modules, under the release's settings, against the authors' arrays on
tiny weights.

Every size comes from the files in KVPO_GOLDEN_DIR (default tests/golden). Tolerance 2e-5 on values
of scale 1 to 5.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equipment import pixels_of
from ml_collections import ConfigDict

from kvpo_jax import programs
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import block as block_lib
from kvpo_jax.algorithm import flow, kv_cache, memory_bank, objective, replay, routing
from kvpo_jax.convert.wan_weights import to_ours, wan_table
from kvpo_jax.models.wan import Wan, WanConfig
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding
from kvpo_jax.types import BlockKV, KVCache, MemoryBank, ReplayTuples

pytestmark = pytest.mark.golden
TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def sizes(golden_dir: Path) -> dict:
    return json.loads((golden_dir / "config_tiny.json").read_text())


@pytest.fixture(scope="module")
def cfg(sizes) -> WanConfig:
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    return WanConfig(
        **{n: sizes[n] for n in names}, channels=sizes["in_dim"], patch=tuple(sizes["patch_size"])
    )


def renoise_schedule(steps: tuple[float, ...], shift: float) -> flow.Schedule:
    """That of the release: its cached latent has the noise of step 0.001."""
    sampler = {"steps": steps, "shift": shift, "solver": "renoise", "context_step": 0.001}
    return flow.schedule(ConfigDict(sampler))


@pytest.fixture(scope="module")
def schedule(sizes) -> flow.Schedule:
    steps = tuple(s / 1000 for s in sizes["denoising_step_list"])
    return renoise_schedule(steps, sizes["timestep_shift"])


def load_params(path: Path, cfg: WanConfig):
    """An official state dict as the collection `params`."""
    state, table = np.load(path), wan_table(cfg.num_layers)
    assert set(state.files) == set(table)
    layers = {}
    for name, (ours, _) in table.items():  # a stack's layers come in their order
        layers.setdefault(ours, []).append(to_ours(ours, state[name]))
    stacks = ("blocks/", "text_kv/")
    flat = {ours: np.stack(x) if ours.startswith(stacks) else x[0] for ours, x in layers.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def latent(x: np.ndarray) -> jnp.ndarray:
    """[..., F, C, H, W] -> [..., F, Y, X, C]."""
    return jnp.asarray(np.moveaxis(x, -3, -1))


def blocks_of(video: np.ndarray, frames: int) -> jnp.ndarray:
    """[1, n * F, C, H, W] -> [n, F, Y, X, C]."""
    return latent(video[0]).reshape(-1, frames, *latent(video[0]).shape[1:])


def release_window(sizes: dict, nearest: int, capacity: int) -> routing.Window:
    """The release counts the current block in its window and in its m nearest frames; ours counts
    past frames.
    """
    frames, sink = sizes["num_frame_per_block"], sizes["sink_size"]
    past = sizes["local_attn_size"] - sink - frames
    return routing.Window(sink, past, nearest - frames, nearest, capacity, shared_ring=True)


def branch_contexts(
    window: routing.Window, drawn: np.ndarray, start_frame: int, is_perturbed: bool, passes: int
) -> jnp.ndarray:
    """int32[1, 1 + G, passes, A] of the anchor and G branches, which drew the frames int32[G, 6].

    The release routes every pass of a perturbed block, that for the cache too.
    """
    anchor = jnp.zeros((1, window.routed), jnp.int32)  # it never reads these
    drawn = jnp.concatenate([anchor, jnp.asarray(drawn)])[None]
    is_branch = jnp.arange(drawn.shape[1])[:, None] > 0
    perturbed = is_branch & jnp.full(passes, bool(is_perturbed))
    return routing.context_frames(window, drawn, start_frame, perturbed)


def bank_of(
    data, prefix: str, recorded: int, newest: int, frames, pending: bool, cfg: WanConfig
) -> MemoryBank:
    """A released memory bank as ours; `frames` int[L, slots] are those of its slots."""

    def stack(name):
        return np.stack([data[f"{prefix}.{name}.{layer}"] for layer in range(cfg.num_layers)])

    def heads(x, *lead):
        return x.reshape(cfg.num_layers, 1, *lead, -1, cfg.num_heads, cfg.head_dim)

    frames = np.asarray(frames)

    def full(value):
        return jnp.full((cfg.num_layers, 1), value)

    return MemoryBank(
        k=heads(stack("k"), frames.shape[1]),
        v=heads(stack("v"), frames.shape[1]),
        frame=frames[:, None],
        new_k=heads(stack("k_new")),
        new_v=heads(stack("v_new")),
        new_frame=full(newest),
        recorded=full(recorded),
        pending=full(pending),
        interval=3,
        reinsert=True,
    )


def empty_cache(cfg: WanConfig, batch: tuple, slots: int, tokens: int, sink: int) -> KVCache:
    shape = kv_cache.KVShape(cfg.num_layers, tokens, cfg.num_heads, cfg.head_dim)
    return kv_cache.empty(shape, batch, slots, sink, jnp.float32)


def history_of(data, prefix: str, fork: int, capacity: int, cfg: WanConfig, sink: int) -> KVCache:
    """A released cache (sink, then the resident frames in order) as ours."""
    resident = (
        list(range(fork))
        if fork <= capacity
        else [*range(sink), *range(fork - capacity + sink, fork)]
    )

    def stack(name):
        return np.stack([data[f"{prefix}.{name}.{layer}"] for layer in range(cfg.num_layers)])

    def frames(x):
        return x.reshape(cfg.num_layers, 1, capacity, -1, cfg.num_heads, cfg.head_dim)

    k, v = frames(stack("k")), frames(stack("v"))
    cache = empty_cache(cfg, (1,), capacity, k.shape[3], sink)
    for slot, frame in enumerate(resident):
        cache = kv_cache.append(
            cache, BlockKV(k=k[:, :, slot : slot + 1], v=v[:, :, slot : slot + 1]), frame
        )
    return cache


def test_weight_table_names_every_tensor(golden_dir, cfg):
    assert set(np.load(golden_dir / "longlive_weights.npz").files) == set(wan_table(cfg.num_layers))


@pytest.mark.parametrize("shift", ["5", "8"])
def test_scheduler(golden_dir, shift):
    data = json.loads((golden_dir / "scheduler.json").read_text())[f"shift_{shift}"]
    table = flow.warp(1 - np.arange(1000) / 1000, float(shift))
    np.testing.assert_allclose(table[data["index"]], data["sigmas"], atol=1e-6)
    ours = renoise_schedule((1.0, 0.75, 0.5, 0.25), float(shift))
    np.testing.assert_allclose(1000 * ours.sigma[:4], data["warped"], rtol=1e-6)
    np.testing.assert_allclose(ours.sigma[4], data["sigmas"][-1], atol=1e-7)
    # The release looks the nearest of its 1000 levels up.
    sigma = np.array([table[np.argmin(np.abs(1000 * table - t))] for t in data["t"]], np.float32)
    level = sigma.reshape(-1, *[1] * (np.ndim(data["x"]) - 1))
    x, noise = np.asarray(data["x"], np.float32), np.asarray(data["noise_or_flow"], np.float32)
    np.testing.assert_allclose(flow.add_noise(x, noise, level), data["add_noise"], **TOLERANCE)
    np.testing.assert_allclose(flow.to_clean(x, noise, level), data["flow_to_x0"], **TOLERANCE)


@pytest.mark.parametrize("case", ["cap33", "cap18"])
def test_longlive_block(golden_dir, sizes, cfg, schedule, case):
    """A whole video, free-running: every flow, every clean latent, and the caches in the middle and
    at the end.
    """
    data = np.load(golden_dir / "longlive_block.npz")

    def get(name):
        return data[f"{case}.{name}"]

    frames, sink = sizes["num_frame_per_block"], sizes["sink_size"]
    capacity = get("kv_final.k.0").shape[1] // sizes["tokens_per_frame"]
    window = release_window(sizes, frames, capacity)
    params = load_params(golden_dir / "longlive_weights.npz", cfg)
    network = partial(Wan(cfg).apply, {"params": params})
    text = Wan(cfg).apply(
        {"params": params}, jnp.asarray(get("prompt_embeds")), method="encode_text"
    )
    step = jax.jit(partial(block_lib.denoise_block, network, schedule))
    history = empty_cache(cfg, (1,), capacity, sizes["tokens_per_frame"], sink)
    start_noise = blocks_of(get("init_noise"), frames)
    for block, first in enumerate(get("start_frame")):
        noise = jnp.concatenate([start_noise[block][None], latent(get("noise")[block])])[None]
        default = routing.deployment_frames(window, first)
        context = jnp.broadcast_to(default, (1, 1, noise.shape[1], window.slots))
        record, kv = step(text, history, None, context, noise, first)
        history = kv_cache.append(history, kv, first)
        np.testing.assert_allclose(record.z[0, 0], latent(get("noisy")[block, :-1]), **TOLERANCE)
        np.testing.assert_allclose(record.u[0, 0], latent(get("flow")[block, :-1]), **TOLERANCE)
        np.testing.assert_allclose(record.x_clean[0, 0], latent(get("x0")[block, -2]), **TOLERANCE)
        done = (block + 1) * frames
        name = {7: "kv_after_block7", len(get("start_frame")) - 1: "kv_final"}.get(block)
        if name:
            theirs = history_of(data, f"{case}.{name}", done, capacity, cfg, sink)
            resident = sorted(set(theirs.frame[0].tolist()) - {-1})
            asked = jnp.asarray(resident)[None, None]
            ours, theirs = kv_cache.read(asked, history), kv_cache.read(asked, theirs)
            np.testing.assert_array_equal(ours.frame, asked[0])
            np.testing.assert_allclose(ours.k, theirs.k, **TOLERANCE)
            np.testing.assert_allclose(ours.v, theirs.v, **TOLERANCE)


CHR = {
    "A": "A_m3_cap33_fork15",
    "B": "B_m4_cap33_fork15",
    "C": "C_m3_cap18_fork27_rolled",
    "D": "D_m4_cap33_fork36_rolled",
}


def load_chr(golden_dir: Path, case: str):
    return np.load(golden_dir / f"longlive_chr_{CHR[case]}.npz")


@pytest.mark.parametrize("case", CHR)
def test_longlive_chr(golden_dir, sizes, cfg, schedule, case):
    """Anchor and branches of a perturbed window and the ordinary block after it, from the released
    fork cache.

    The frames are those that the release really routed (`actual_routed_frames`): after its cache
    has rolled they are one block later than it planned, which is a bug of its slot arithmetic and
    not reproduced.
    """
    data = load_chr(golden_dir, case)
    fork, capacity, nearest = int(data["fork_frame"]), int(data["capacity"]), int(data["m_nearest"])
    frames = sizes["num_frame_per_block"]
    window = release_window(sizes, nearest, capacity)
    routed_frames = jnp.asarray(data["actual_routed_frames"])
    branches = routed_frames.shape[0]
    params = load_params(golden_dir / "longlive_weights.npz", cfg)
    network = partial(Wan(cfg).apply, {"params": params})
    text = Wan(cfg).apply(
        {"params": params}, jnp.asarray(data["prompt_embeds"]), method="encode_text"
    )
    step = jax.jit(partial(block_lib.denoise_block, network, schedule))
    history = history_of(data, "fork_kv", fork, capacity, cfg, window.sink)
    page = empty_cache(cfg, (1, 1 + branches), capacity, sizes["tokens_per_frame"], window.sink)
    start_noise = blocks_of(data["init_noise_window"], frames)
    for block, noise in enumerate(data["shared.noise"]):
        first = fork + block * frames
        noise = jnp.concatenate([start_noise[block][None], latent(noise)])[None]
        is_perturbed = first < data["perturb_end_frame"]
        context = branch_contexts(window, routed_frames, first, is_perturbed, noise.shape[1])
        record, kv = step(text, history, page, context, noise, first)
        page = kv_cache.append(page, kv, first)
        for trajectory, name in enumerate(["anchor", *(f"branch{g}" for g in range(branches))]):
            np.testing.assert_allclose(
                record.z[0, trajectory], latent(data[f"{name}.noisy"][block, :-1]), **TOLERANCE
            )
            clean = latent(data[f"{name}.output"][0])[block * frames : (block + 1) * frames]
            np.testing.assert_allclose(record.x_clean[0, trajectory], clean, **TOLERANCE)
            if f"{name}.flow" in data:
                flows = latent(data[f"{name}.flow"][block, :-1])
                np.testing.assert_allclose(record.u[0, trajectory], flows, **TOLERANCE)


@pytest.mark.parametrize("case", CHR)
def test_routed_pool(golden_dir, sizes, case):
    """Omega as the release plans it, and its draws from its own permutation."""
    plan = json.loads((golden_dir / "longlive_chr_plans.json").read_text())[CHR[case]]
    window = release_window(
        sizes, plan["m_nearest_frames"], int(load_chr(golden_dir, case)["capacity"])
    )
    fork, end = plan["perturb_block_abs_frame"], plan["perturb_block_end_frame"]
    pool = routing.routable(window, fork, fork, end - sizes["num_frame_per_block"])
    expected = range(plan["stable_older_frame_start"], plan["stable_older_frame_end"])
    assert np.flatnonzero(pool).tolist() == list(expected)
    assert window.routed == plan["n_random_frames"]


OFFICIAL = {
    "longlive_m4": ("configs/longlive.py:release", ()),
    "longlive_m3": ("configs/longlive.py:release", ("window.near=0", "window.excluded=3")),
    "memflow_m3": ("configs/memflow.py:release", ()),
}


@pytest.mark.parametrize("layout", OFFICIAL)
def test_official_plans(golden_dir, layout):
    """The frames that a run of the preset draws at every start of the released layout are those of
    its pool, and the branches' draws the release's shifts of one permutation.
    """
    data = json.loads((golden_dir / "plans_official_layout.json").read_text())[layout]
    spec, fields = OFFICIAL[layout]
    config = config_lib.override(config_lib.load(spec), [f"--config.{field}" for field in fields])
    branches, capacity = data["args"]["K"], data["cache_frames"]
    assert config.rollout.window_blocks == data["args"]["perturb_num_blocks"]
    assert (config.window.cache_frames, config.rollout.branches) == (capacity, branches)
    draw = programs.build(config, sharding.make_mesh(1, 1, 1, branches)).draw
    starts = data["eligible_starts_chunk_block_abs_pool_n_start_end"]
    for _, _, fork, size, draws, first, last in starts:
        # MemFlow's are slots of its cache at the fork: the sink, then the newest frames.
        slots = [*range(3), *range(max(fork - capacity, 0) + 3, fork)]
        pool = slots[:size] if first < 0 else list(range(first, last))
        drawn = np.asarray(draw(jax.random.key(fork), np.arange(40), fork))
        assert drawn.shape == (40, branches, draws) and len(pool) == size
        assert np.unique(drawn).tolist() == pool
    for plan in data["plans"]:
        permutation = np.asarray(plan["master_perm"])
        permutation += plan["plan"].get("stable_older_frame_start", 0)
        ours = routing.disperse(
            permutation, len(permutation), plan["plan"]["n_random_frames"], branches
        )
        theirs = [b["selected_older_frame_indices"] for b in plan["plan"]["branch_plans"]]
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("tag", ["old_nograd", "same_grad2", "theta_grad2", "theta_grad4"])
def test_longlive_replay(golden_dir, sizes, cfg, schedule, case, tag):
    """log-probabilities of the branches under a replaying model, and their gradient in every
    parameter.

    The release draws context noise anew for each branch. Ours is shared by a prompt's branches, so
    each of its branches is a prompt with one branch here.
    """
    data, saved = load_chr(golden_dir, case), np.load(golden_dir / "longlive_replay.npz")
    # A run that differs in its gradient only has the values of the other.
    values = {"same_grad2": "old_nograd", "theta_grad4": "theta_grad2"}.get(tag, tag)

    def get(name):
        return saved[f"{case}.{values}.{name}"]

    fork, capacity = int(data["fork_frame"]), int(data["capacity"])
    frames, steps = sizes["num_frame_per_block"], len(sizes["denoising_step_list"])
    window = release_window(sizes, int(data["m_nearest"]), capacity)
    branches = len(get("log_prob"))
    names = [f"branch{g}" for g in range(branches)]
    z = jnp.stack([latent(data[f"{n}.noisy"][:, :steps]) for n in names])[:, None]
    u = jnp.stack([latent(data[f"{n}.flow"][:, :steps]) for n in names])[:, None]
    starts = fork + frames * np.arange(z.shape[2])
    noise = jnp.asarray(latent(get("ctx_noise")))
    blank = empty_cache(cfg, (branches,), capacity, sizes["tokens_per_frame"], window.sink)
    history = history_of(data, "fork_kv", fork, capacity, cfg, window.sink)
    tuples = ReplayTuples(
        z=z,
        u=u,
        history=history.replace(
            k=jnp.repeat(history.k, branches, axis=1),
            v=jnp.repeat(history.v, branches, axis=1),
            frame=jnp.repeat(history.frame, branches, axis=0),
        ),
        page=blank,
        frames=jnp.stack([routing.deployment_frames(window, start) for start in starts]),
        start_frame=jnp.asarray(starts, jnp.int32),
        segment=jnp.zeros(len(starts), jnp.int32),
        noise=jnp.concatenate([noise, jnp.zeros_like(noise[:, :1])], axis=1),
    )
    base = load_params(golden_dir / "longlive_weights.npz", cfg)
    model = Wan(cfg)
    text = model.apply({"params": base}, jnp.asarray(data["prompt_embeds"]), method="encode_text")
    text = jax.tree.map(lambda x: jnp.repeat(x, branches, axis=1)[:, :, None], text)
    grad_steps = {"same_grad2": 2, "theta_grad2": 2}.get(tag, steps)
    settings = ConfigDict(
        {"energy": "clean", "sigma_floor": 1.0, "grad_steps": grad_steps, "chunk": 0}
    )

    def log_prob(params):
        def policy(text, params):
            return (partial(model.apply, {"params": params}), text)

        setting = replay.Setting(settings, schedule)
        energies, _ = replay.self_rolled_energies(policy, setting, params, text, tuples)
        return -energies[:, 0]

    params = load_params(golden_dir / "longlive_weights_theta.npz", cfg) if "theta" in tag else base
    value, pull = jax.vjp(jax.jit(log_prob), params)
    np.testing.assert_allclose(value, get("log_prob"), **TOLERANCE)

    official = [name for name in saved.files if name.startswith(f"{case}.{tag}.grad.")]
    if tag == "old_nograd":
        assert not official
        return
    (gradient,) = pull(jnp.ones_like(value))
    gradient = flax.traverse_util.flatten_dict(gradient, sep="/")
    table = wan_table(cfg.num_layers)

    def ours(name):
        return (lambda path, layer: gradient[path] if layer is None else gradient[path][layer])(
            *table[name]
        )

    for name in official:
        parameter = name.removeprefix(f"{case}.{tag}.grad.")
        np.testing.assert_allclose(
            ours(parameter), to_ours(table[parameter][0], saved[name]), **TOLERANCE
        )
    plans = json.loads((golden_dir / "longlive_chr_plans.json").read_text())
    # The text keys and values come from the cache of the rollout.
    for name in plans[f"{CHR[case]}_params_with_no_gradient"]:
        assert not ours(name).any(), name


RECACHE = (
    "cap33_h24_gsTrue",
    "cap33_h24_gsFalse",
    "cap18_h24_gsTrue",
    "cap33_h9_gsTrue",
    "cap33_h9_gsFalse",
)


@pytest.mark.parametrize("case", RECACHE)
def test_recache(golden_dir, sizes, cfg, schedule, case):
    """A prompt switch: the caches after it, and the two blocks that follow, with and without the
    global sink.
    """
    data = np.load(golden_dir / "recache.npz")

    def get(name):
        return data[f"{case}.{name}"]

    frames, sink, tokens = (
        sizes["num_frame_per_block"],
        sizes["sink_size"],
        sizes["tokens_per_frame"],
    )
    capacity, past = get("kv_after_recache.k.0").shape[1] // tokens, get("history").shape[1]
    window = release_window(sizes, frames, capacity)
    variables = {"params": load_params(golden_dir / "longlive_weights.npz", cfg)}
    network = partial(Wan(cfg).apply, variables)

    def encode(name):
        return Wan(cfg).apply(variables, jnp.asarray(data[name]), method="encode_text")

    old, new = encode("prompt_embeds_old"), encode("prompt_embeds_new")
    # The released history was written from clean latents under the old prompt; what it holds of
    # them is not saved. Only the sink of it survives, so the clean pass of the sink's block is all
    # that has to be made here.
    history = empty_cache(cfg, (1,), capacity, tokens, sink)
    start = int(get("recache_start_frame"))
    after = history_of(data, f"{case}.kv_after_recache", past, capacity, cfg, sink)
    if start:
        kept = kv_cache.read(jnp.arange(sink)[None, None], after)
        history = kv_cache.append(history, BlockKV(k=kept.k, v=kept.v), 0)
        if case.endswith("gsFalse"):
            history = kv_cache.forget(jnp.ones(1, bool), history)
            np.testing.assert_array_equal(kept.k, 0)
    latents = jnp.asarray(latent(get("recache_input")))[None]
    velocity = []

    def recorded(*args):
        out = network(*args)
        velocity.append(out[0])
        return out

    kv = block_lib.recache(recorded, new, history, None, latents, start)
    np.testing.assert_allclose(velocity[0][0], latent(get("recache_flow"))[0], **TOLERANCE)
    history = kv_cache.append(history, kv, start)
    asked = jnp.arange(start, past)[None, None]
    ours, theirs = kv_cache.read(asked, history), kv_cache.read(asked, after)
    np.testing.assert_allclose(ours.k, theirs.k, **TOLERANCE)
    np.testing.assert_allclose(ours.v, theirs.v, **TOLERANCE)

    step = jax.jit(partial(block_lib.denoise_block, network, schedule))
    start_noise = blocks_of(get("next.init_noise"), frames)
    for block, first in enumerate(get("next.start_frame")):
        noise = jnp.concatenate([start_noise[block][None], latent(get("next.noise")[block])])[None]
        default = routing.deployment_frames(window, first)
        context = jnp.broadcast_to(default, (1, 1, noise.shape[1], window.slots))
        record, kv = step(new, history, None, context, noise, first)
        history = kv_cache.append(history, kv, first)
        np.testing.assert_allclose(
            record.u[0, 0], latent(get("next.flow")[block, :-1]), **TOLERANCE
        )
        np.testing.assert_allclose(
            record.x_clean[0, 0], latent(get("next.x0")[block, -2]), **TOLERANCE
        )
    assert not np.allclose(old.k, new.k)


@pytest.mark.parametrize("case", ["sma0", "sma1", "sma0_cap18"])
def test_memflow_block(golden_dir, sizes, cfg, schedule, case):
    """A whole video with the memory bank, free-running: flows, clean latents, what each layer's
    bank holds.
    """
    data = np.load(golden_dir / "memflow_block.npz")

    def get(name):
        return data[f"{case}.{name}"]

    frames, sink, tokens = (
        sizes["num_frame_per_block"],
        sizes["sink_size"],
        sizes["tokens_per_frame"],
    )
    slots = get("bank_frames").shape[-1]
    interval = int(np.diff(get("recorded_frames"))[0]) // frames
    capacity = 18 if case.endswith("cap18") else 33
    window = release_window(sizes, frames, capacity)
    cfg = dataclasses.replace(cfg, sparse_memory=slots if case.startswith("sma1") else 0)
    variables = {"params": load_params(golden_dir / "memflow_weights.npz", cfg)}
    network = partial(Wan(cfg).apply, variables)
    text = Wan(cfg).apply(variables, jnp.asarray(get("prompt_embeds")), method="encode_text")
    step = jax.jit(partial(block_lib.denoise_block, network, schedule))
    history = empty_cache(cfg, (1,), capacity, tokens, sink)
    history = history.replace(bank=memory_bank.empty(history, slots, interval, reinsert=True))
    start_noise = blocks_of(get("init_noise"), frames)
    for block, first in enumerate(get("start_frame")):
        history = kv_cache.admit(history, text)
        np.testing.assert_array_equal(history.bank.frame[:, 0], get("bank_frames")[block])
        noise = jnp.concatenate([start_noise[block][None], latent(get("noise")[block])])[None]
        default = routing.deployment_frames(window, first)
        context = jnp.broadcast_to(default, (1, 1, noise.shape[1], window.slots))
        record, kv = step(text, history, None, context, noise, first)
        history = kv_cache.append(history, kv, first)
        np.testing.assert_allclose(record.z[0, 0], latent(get("noisy")[block, :-1]), **TOLERANCE)
        np.testing.assert_allclose(record.u[0, 0], latent(get("flow")[block, :-1]), **TOLERANCE)
        np.testing.assert_allclose(record.x_clean[0, 0], latent(get("x0")[block, -2]), **TOLERANCE)
    theirs = bank_of(data, f"{case}.bank_final", 0, 0, get("bank_frames")[-1], False, cfg)
    for name in ("k", "v", "new_k", "new_v"):
        np.testing.assert_allclose(getattr(history.bank, name), getattr(theirs, name), **TOLERANCE)


MEMFLOW_CHR = {
    "A": "A_m3_cap33_fork15",
    "B": "B_m4_cap33_fork33_bankfull",
    "C": "C_m3_cap18_fork27_rolled",
}


@pytest.mark.parametrize("case", MEMFLOW_CHR)
def test_memflow_chr(golden_dir, sizes, cfg, schedule, case):
    """Anchor and branches of a perturbed window under the memory bank.

    The release draws cache *slots* and drops the sink; which frame a slot holds moves once the
    cache has rolled. The rows here name the frames that it really read.
    """
    data = np.load(golden_dir / f"memflow_chr_{MEMFLOW_CHR[case]}.npz")
    fork, capacity, nearest = int(data["fork_frame"]), int(data["capacity"]), int(data["m_nearest"])
    frames, sink, tokens = (
        sizes["num_frame_per_block"],
        sizes["sink_size"],
        sizes["tokens_per_frame"],
    )
    window = dataclasses.replace(
        release_window(sizes, nearest, capacity), keep_sink=False, shared_ring=False
    )
    routed_frames = data["selected"]
    branches, slots = len(routed_frames), data["branch0.bank_frames"].shape[-1]
    assert routed_frames.shape[1] == window.routed
    variables = {"params": load_params(golden_dir / "memflow_weights.npz", cfg)}
    network = partial(Wan(cfg).apply, variables)
    text = Wan(cfg).apply(variables, jnp.asarray(data["prompt_embeds"]), method="encode_text")
    step = jax.jit(partial(block_lib.denoise_block, network, schedule))
    history = history_of(data, "fork_kv", fork, capacity, cfg, sink)
    newest = (fork // frames - 1) // 3 * 3 * frames
    recorded = newest // (3 * frames) + 1
    # The frames in the saved bank do not matter to the network; any that are there will do.
    saved = np.where(np.arange(slots) < recorded, 0, -1)[None].repeat(cfg.num_layers, 0)
    bank = bank_of(data, "fork_bank", recorded, newest, saved, fork - frames == newest, cfg)
    page = empty_cache(cfg, (1, 1 + branches), capacity, tokens, sink)
    page = page.replace(bank=memory_bank.repeat(bank, 1 + branches))
    start_noise = blocks_of(data["init_noise_window"], frames)
    for block, noise in enumerate(data["shared.noise"]):
        first = fork + block * frames
        page = kv_cache.admit(page, text)
        noise = jnp.concatenate([start_noise[block][None], latent(noise)])[None]
        evicted = max(0, first + frames - capacity)
        held = np.where(routed_frames < sink, routed_frames, routed_frames + evicted)
        is_perturbed = first < data["perturb_end_frame"]
        context = branch_contexts(window, held, first, is_perturbed, noise.shape[1])
        record, kv = step(text, history, page, context, noise, first)
        page = kv_cache.append(page, kv, first)
        for trajectory, name in enumerate(["anchor", *(f"branch{g}" for g in range(branches))]):
            np.testing.assert_allclose(
                record.z[0, trajectory], latent(data[f"{name}.noisy"][block, :-1]), **TOLERANCE
            )
            clean = latent(data[f"{name}.output"][0])[block * frames : (block + 1) * frames]
            np.testing.assert_allclose(record.x_clean[0, trajectory], clean, **TOLERANCE)


def stub_scorer(pixels, sentences):
    """The reward of rollout_train.json: VQ from the first two channels and the sentence's length,
    MQ from motion.
    """
    length = jnp.asarray([len(s) for s in sentences], jnp.float32)

    def channel(c):
        return pixels[..., c]

    vq = (
        20 * channel(0).mean((1, 2, 3))
        + 10 * jnp.std(channel(1), axis=(1, 2, 3), ddof=1)
        + 0.01 * length
    )
    return {"vq": vq, "mq": 30 * jnp.abs(jnp.diff(channel(2), axis=1)).mean((1, 2, 3))}


def stub_decode(latents):
    """Latents [..., frames, Y, X, C] -> pixels: the first frame once, every other four times."""
    pixels = 0.5 + 0.1 * latents[..., :3]
    return jnp.concatenate(
        [pixels[..., :1, :, :, :], jnp.repeat(pixels[..., 1:, :, :, :], 4, axis=-4)], axis=-4
    )


def test_rollout_train(golden_dir, sizes, cfg, schedule):
    """One whole iteration of the release: rollout with a prompt switch, rewards, replays, two PPO
    epochs, EMA.

    The release trains every parameter here, not LoRA, and draws new context noise for each replay;
    otherwise these are the functions of an iteration of ours.
    """
    data, facts = (
        np.load(golden_dir / "rollout_train.npz"),
        json.loads((golden_dir / "rollout_train.json").read_text()),
    )
    hyper, fork, switch, perturb_end = (
        facts["hyper"],
        facts["fork"],
        facts["switch"][0],
        facts["perturb_end"],
    )
    frames, sink, tokens = (
        sizes["num_frame_per_block"],
        sizes["sink_size"],
        sizes["tokens_per_frame"],
    )
    capacity = 33
    window = release_window(sizes, facts["m_nearest"], capacity)
    old = load_params(golden_dir / "longlive_weights.npz", cfg)
    theta = load_params(golden_dir / "longlive_weights_theta.npz", cfg)
    initial = jax.tree.map(lambda a, b: (a + b) / 2, old, theta)
    model = Wan(cfg)
    network = partial(model.apply, {"params": old})
    encode = jax.jit(partial(model.apply, {"params": old}, method="encode_text"))
    texts = [encode(jnp.asarray(data[f"prompt_embeds.{m}"])) for m in range(2)]
    routed_frames = jnp.asarray(data["selected"])
    branches = len(routed_frames)
    cache = partial(empty_cache, cfg, slots=capacity, tokens=tokens, sink=sink)

    # The rollout.
    step = jax.jit(partial(block_lib.denoise_block, network, schedule))
    recache, append = jax.jit(partial(block_lib.recache, network)), jax.jit(kv_cache.append)
    history, page, at_fork = cache((1,)), None, None
    start_noise, videos, records = blocks_of(data["init_noise"], frames), [], []
    for block, noise in enumerate(data["step_noise"]):
        first = block * frames
        trajectories = 1 if first < fork else 1 + branches
        if first == fork:
            page, at_fork = cache((1, trajectories)), history
            videos = [jnp.repeat(v, trajectories, axis=1) for v in videos]
        if first == switch:
            recent = jnp.concatenate(videos[-4:], axis=2)
            kv = recache(texts[1], history, page, recent, first - recent.shape[2])
            page = append(page, kv, first - recent.shape[2])
        noise = jnp.concatenate([start_noise[block][None], latent(noise)])[None]
        is_perturbed = fork <= first < perturb_end
        drawn = routed_frames[: trajectories - 1]
        context = branch_contexts(window, drawn, first, is_perturbed, noise.shape[1])
        record, kv = step(texts[int(first >= switch)], history, page, context, noise, first)
        if page is None:
            history = append(history, kv, first)
        else:
            page = append(page, kv, first)
        videos.append(record.x_clean)
        if fork <= first < switch:
            records.append(record)
    video = jnp.concatenate(videos, axis=2)[0]
    theirs = latent(data["latents_branch0to3_then_anchor"])
    np.testing.assert_allclose(
        video, jnp.concatenate([theirs[branches:], theirs[:branches]]), **TOLERANCE
    )
    z = jnp.stack([r.z[0, 1:] for r in records], axis=1)  # [G, W, S, ...]
    u = jnp.stack([r.u[0, 1:] for r in records], axis=1)
    np.testing.assert_allclose(z, latent(data["traj.noisy"]), **TOLERANCE)

    # Rewards of the whole video and of the fork's chunk, and their advantages.
    pixels = stub_decode(video)
    weights = {"vq": 1.0, "mq": 0.1}
    chunk = next(
        (c["start_frame"], c["start_frame"] + c["new_frames"])
        for c in facts["chunks"]
        if c["chunk_idx"] == 1
    )
    group = pixels_of(pixels[None, 1:], pixels[None, 0])
    clipping = composite.Clipping([switch], 36, composite.latent_to_pixel)
    clips = composite.segment_clips(pixels.shape[1], len(facts["prompts"]), clipping)
    scores = composite.ask_rollout(stub_scorer, group, [facts["prompts"]], weights, clips)()
    # The release decodes the chunk by itself, so that its first latent frame is one pixel frame
    # again.
    alone = stub_decode(video[:, slice(*chunk)])
    local = composite.ask_window(
        stub_scorer,
        pixels_of(alone[None, 1:], alone[None, 0]),
        facts["prompts"][:1],
        weights,
        (0, alone.shape[1]),
    )()
    for ours, name in ((scores, "global"), (local, "local")):
        np.testing.assert_allclose(ours.branches[0], facts[f"rewards_{name}"], rtol=1e-6)
        np.testing.assert_allclose(ours.anchor[0], facts[f"anchor_reward_{name}"], rtol=1e-6)
        for component, value in facts[f"rewards_{name}_components"].items():
            np.testing.assert_allclose(ours.components[component][0][0], value, rtol=2e-6)
    settings = ConfigDict(
        {
            "advantage": "anchor",
            "advantage_clip": hyper["adv_clip_max"],
            "fusion_normalize": hyper["fusion"],
            "local_weight": hyper["w_local"],
            "global_weight": hyper["w_global"],
            "tau": 1.0,
            "tau_unit": "absolute",
            "beta": hyper["kl_coef"],
            "clip_low": hyper["clip_low"],
            "clip_high": hyper["clip_high"],
            "gate": hyper["mechanism"],
        }
    )
    advantages = objective.compute_advantages(settings, weights, scores, local)[0]
    # Differences of rewards that agree in six digits: a reward's rounding, over the spread of .001,
    # is .002.
    np.testing.assert_allclose(advantages, facts["metrics"]["advantage_fused"], atol=5e-3)
    gate_open = objective.open_gates(scores, local)[0]
    assert bool(gate_open) == facts["epoch_logs"][0]["policy"]["is_safe_rank"]

    # Replays: each branch is a prompt with one branch, because its context noise is its own.
    starts = fork + frames * np.arange(z.shape[1])

    def repeated(x, axis):
        return jnp.repeat(x, branches, axis=axis)

    noises = latent(data["replay_ctx_noise.old_initial_epoch0_epoch1"])
    text = jax.tree.map(lambda x: repeated(x, 1)[:, :, None], texts[0])
    replay_settings = ConfigDict(
        {"energy": "clean", "sigma_floor": 1.0, "grad_steps": hyper["grad_steps"], "chunk": 0}
    )

    def energies(params, noise):
        tuples = ReplayTuples(
            z=z[:, None],
            u=u[:, None],
            history=at_fork.replace(
                k=repeated(at_fork.k, 1), v=repeated(at_fork.v, 1), frame=repeated(at_fork.frame, 0)
            ),
            page=cache((branches,)),
            frames=jnp.stack([routing.deployment_frames(window, start) for start in starts]),
            start_frame=jnp.asarray(starts, jnp.int32),
            segment=jnp.zeros(len(starts), jnp.int32),
            noise=jnp.concatenate([noise, jnp.zeros_like(noise[:, :1])], axis=1),
        )

        def policy(text, params):
            return (partial(model.apply, {"params": params}), text)

        setting = replay.Setting(replay_settings, schedule)
        energies, _ = replay.self_rolled_energies(policy, setting, params, text, tuples)
        return energies[:, 0]

    evaluated = jax.jit(energies)
    e_old, e_initial = evaluated(old, noises[0]), evaluated(initial, noises[1])

    def loss(params, noise):
        e = energies(params, noise)
        value, diagnostics = objective.loss(
            settings,
            e,
            e_old,
            e_initial,
            jnp.asarray(facts["metrics"]["advantage_fused"]),
            gate_open,
        )
        return value, (e, diagnostics)

    trained = ConfigDict(
        {
            "learning_rate": hyper["lr"],
            "warmup": 0,
            "weight_decay": hyper["weight_decay"],
            "grad_clip": hyper["max_grad_norm"],
        }
    )
    optimiser = state_lib.make_optimiser(trained)
    params, ema, state = theta, theta, jax.jit(optimiser.init)(theta)
    table = wan_table(cfg.num_layers)

    def pick(tree, name):
        return (lambda path, layer: tree[path] if layer is None else tree[path][layer])(
            *table[name]
        )

    def named(tree):
        return flax.traverse_util.flatten_dict(tree, sep="/")

    @jax.jit
    def improved(params, ema, state, grads):
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 1 - hyper["ema_decay"]), state

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for epoch, log in enumerate(facts["epoch_logs"]):
        (value, (e, diagnostics)), grads = gradient(params, noises[2 + epoch])
        np.testing.assert_allclose(-e, log["policy"]["log_pi_theta"], **TOLERANCE)
        np.testing.assert_allclose(-e_old, log["policy"]["log_pi_old"], **TOLERANCE)
        np.testing.assert_allclose(value, log["loss_total"], **TOLERANCE)
        np.testing.assert_allclose(
            settings.beta * diagnostics.kl, log["policy"]["loss_kl"], **TOLERANCE
        )
        np.testing.assert_allclose(optax.global_norm(grads), log["grad_norm"], rtol=1e-4)
        for name in (n for n in data.files if n.startswith(f"grad_epoch{epoch}.")):
            parameter = name.removeprefix(f"grad_epoch{epoch}.")
            theirs = to_ours(table[parameter][0], data[name])
            np.testing.assert_allclose(
                pick(named(grads), parameter), theirs, atol=1e-4 * np.abs(theirs).max()
            )
        params, ema, state = improved(params, ema, state, grads)
    for kind, tree in (("param", params), ("ema", ema)):
        for name in (n for n in data.files if n.startswith(f"{kind}_after.")):
            parameter = name.removeprefix(f"{kind}_after.")
            np.testing.assert_allclose(
                pick(named(tree), parameter), to_ours(table[parameter][0], data[name]), **TOLERANCE
            )
