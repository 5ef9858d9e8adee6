"""The Wan VAE: the authors' arrays, diffusers, and streaming."""

import dataclasses
import json
from functools import partial

import chex
import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.convert import wan_vae_weights
from kvpo_jax.models import wan_vae
from kvpo_jax.types import SplitRows

TOLERANCE = {"atol": 2e-5, "rtol": 0}


def from_official(state):
    cfg = wan_vae_weights.config_from_shapes({name: tensor.shape for name, tensor in state.items()})
    table = wan_vae_weights.vae_table(cfg)
    assert table.keys() == state.keys()
    flat = {
        path: jnp.asarray(wan_vae_weights.to_ours(path, state[name]))
        for name, path in table.items()
    }
    params = flax.traverse_util.unflatten_dict(flat, sep="/")

    def shape(x):
        return (x.shape, x.dtype)

    assert jax.tree.map(shape, params) == jax.tree.map(shape, wan_vae.abstract_params(cfg))
    return cfg, params


@pytest.fixture(scope="module")
def golden(golden_dir):
    data = np.load(golden_dir / "vae.npz")
    cfg, params = from_official(
        {name.removeprefix("w."): data[name] for name in data.files if name.startswith("w.")}
    )
    return data, cfg, params


def video(x):
    """[B, C, T, H, W] -> [B, T, H, W, C]."""
    return np.moveaxis(x, 1, -1)


@pytest.mark.golden
def test_golden_decode(golden):
    data, cfg, params = golden
    z = np.moveaxis(data["z_btchw"], 2, -1)
    np.testing.assert_allclose(cfg.latent_mean, data["latent_mean"], atol=1e-6)
    np.testing.assert_allclose(cfg.latent_std, data["latent_std"], atol=1e-6)
    ours, _ = jax.jit(partial(wan_vae.decode, cfg))(params, z)
    np.testing.assert_allclose(ours, np.moveaxis(data["decode_to_pixel_btchw"], 2, -1), **TOLERANCE)
    np.testing.assert_allclose(ours, np.clip(video(data["decode_bcthw"]), -1, 1), **TOLERANCE)
    np.testing.assert_allclose(
        ours[:, :1], np.clip(video(data["decode_first_frame_only"]), -1, 1), **TOLERANCE
    )
    unit = dataclasses.replace(cfg, latent_mean=(0.0,) * cfg.z_dim, latent_std=(1.0,) * cfg.z_dim)
    ours, _ = wan_vae.decode(unit, params, z)
    np.testing.assert_allclose(ours, np.clip(video(data["decode_unit_scale"]), -1, 1), **TOLERANCE)


@pytest.mark.golden
def test_golden_stream(golden):
    data, cfg, params = golden
    z, cache, first = np.moveaxis(data["z_btchw"], 2, -1), None, 0
    chunks = sorted(name for name in data.files if name.startswith("stream_chunk"))
    for name in chunks:
        theirs = np.clip(video(data[name]), -1, 1)
        frames = theirs.shape[1] // 4 if first else 1 + (theirs.shape[1] - 1) // 4
        ours, cache = wan_vae.decode(cfg, params, z[:, first : first + frames], cache)
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
        first += frames
    assert first == z.shape[1]


@pytest.mark.golden
def test_golden_encode(golden):
    data, cfg, params = golden
    pixels = video(data["pixels_bcthw"])
    ours = wan_vae.encode(cfg, params, pixels)
    np.testing.assert_allclose(ours, video(data["encode_bcthw"]), **TOLERANCE)
    np.testing.assert_allclose(
        ours, np.moveaxis(data["encode_to_latent_btchw"], 2, -1), **TOLERANCE
    )
    unit = dataclasses.replace(cfg, latent_mean=(0.0,) * cfg.z_dim, latent_std=(1.0,) * cfg.z_dim)
    np.testing.assert_allclose(
        wan_vae.encode(unit, params, pixels), video(data["encode_unit_scale"]), **TOLERANCE
    )


@pytest.fixture(scope="module")
def theirs():
    """A small AutoencoderKLWan with every parameter drawn anew."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            is_gamma = p.ndim in (3, 4) and p.shape[1:].numel() == 1
            p.copy_(0.12 * torch.randn(p.shape) + float(is_gamma))
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    state, cfg = theirs.state_dict(), wan_vae.VAEConfig(num_res_blocks=2)
    return from_official(
        {wan_vae_weights.official_name(name, cfg): x.numpy() for name, x in state.items()}
    )


def test_diffusers(theirs, ours):
    cfg, params = ours
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, size=(2, 9, 32, 48, 3)).astype(np.float32)
    z = rng.normal(size=(2, 5, 4, 6, 4)).astype(np.float32)

    def channels_first(x):
        return torch.tensor(np.moveaxis(x, -1, 1).copy())

    with torch.no_grad():
        encoded = theirs.encode(channels_first(pixels)).latent_dist.mean.numpy()
        decoded = theirs.decode(channels_first(z)).sample.numpy()
    assert np.abs(encoded).max() > 0.1 and np.abs(decoded).std() > 0.05
    np.testing.assert_allclose(wan_vae.encode(cfg, params, pixels), video(encoded), atol=1e-5)
    np.testing.assert_allclose(
        wan_vae.decode(cfg, params, z)[0], np.clip(video(decoded), -1, 1), atol=1e-5
    )


def test_streamed_is_full_whatever_the_chunks(ours):
    cfg, params = ours
    z = jax.random.normal(jax.random.key(0), (1, 7, 2, 3, cfg.z_dim))
    full, _ = wan_vae.decode(cfg, params, z)
    assert full.shape == (1, 25, 16, 24, 3)
    for chunks in ((7,), (3, 3, 1), (1, 2, 4)):
        parts, cache, first = [], None, 0
        for frames in chunks:
            pixels, cache = wan_vae.decode(cfg, params, z[:, first : first + frames], cache)
            parts.append(pixels)
            first += frames
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, **TOLERANCE)


def test_branches_share_the_decoded_prefix(ours):
    cfg, params = ours
    prefix = jax.random.normal(jax.random.key(1), (1, 3, 2, 2, cfg.z_dim))
    rest = jax.random.normal(jax.random.key(2), (3, 2, 2, 2, cfg.z_dim))
    _, cache = wan_vae.decode(cfg, params, prefix, None)
    forked = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), cache)
    pixels, _ = wan_vae.decode(cfg, params, rest, forked)
    whole, _ = wan_vae.decode(
        cfg, params, jnp.concatenate([jnp.repeat(prefix, 3, axis=0), rest], axis=1)
    )
    np.testing.assert_allclose(pixels, whole[:, 9:], **TOLERANCE)


SMALL = wan_vae.VAEConfig(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2, 2),
    num_res_blocks=0,
    temporal_downsample=(False, True),
    latent_mean=(0.5,) * 2,
    latent_std=(2.0,) * 2,
)


@pytest.mark.parametrize("devices, rows", [(2, 8), (4, 5)])
def test_rows_over_devices_are_those_of_whole_frames(devices, rows):
    """Pixels and memory, after a fork and where stages are skipped; also where a device has fewer
    rows than the others, and one has none. A convolution adds in another order for fewer rows. A
    device has its share of the memory, and needs about its share besides.
    """
    split = SplitRows("context", devices, rows)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), "context")
    rng = np.random.default_rng(0)

    def random(like):  # of a size that keeps activations near 1, so that 1e-6 is their rounding
        fan_in = np.prod(like.shape[:-1]) if like.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(fan_in), like.dtype)

    params = jax.tree.map(random, wan_vae.abstract_decoder_params(SMALL))
    prefix, rest = (rng.normal(size=(n, n, rows, 2, 2)).astype(np.float32) for n in (1, 3))

    def decode_rows(*arguments):
        return wan_vae.decode(SMALL, *arguments, rows=split)

    def films(decode, prefix, rest):
        before, cache = jax.jit(decode)(params, prefix, None, None)
        forked = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), cache)
        arguments = (params, rest, forked, jnp.array([3, 1, 3]))
        following = jax.jit(decode).lower(*arguments).compile()
        needed = following.memory_analysis().temp_size_in_bytes
        return (before, following(*arguments)), needed

    of_rows, everywhere = Spec(None, None, "context"), Spec()
    specs = (everywhere, of_rows, of_rows, everywhere)
    sharded = jax.shard_map(decode_rows, mesh=mesh, in_specs=specs, out_specs=(of_rows, of_rows))
    beyond = [(0, 0)] * 2 + [(0, split.padded - rows)] + [(0, 0)] * 2
    parts, needed = films(sharded, *(np.pad(x, beyond) for x in (prefix, rest)))
    whole, needed_for_whole = films(partial(wan_vae.decode, SMALL), prefix, rest)
    assert needed < 0.6 * needed_for_whole
    for ours, theirs in zip(*map(jax.tree.leaves, (parts, whole)), strict=True):
        rows_of_device = ours.addressable_shards[0].data.shape[2]
        assert rows_of_device * rows == split.of_device * theirs.shape[2]
        error = np.abs(np.asarray(ours)[:, :, : theirs.shape[2]] - theirs).max()
        assert error < 1e-6 * max(1, np.abs(theirs).max())
    pixels = whole[1][0]
    assert np.ptp(pixels, axis=0).max() > 0.1 and np.mean(np.abs(pixels) == 1) < 0.1


def test_the_past_does_not_see_the_future(ours):
    cfg, params = ours
    z = jax.random.normal(jax.random.key(3), (1, 4, 2, 2, cfg.z_dim))
    plain, _ = wan_vae.decode(cfg, params, z)
    changed, _ = wan_vae.decode(cfg, params, z.at[:, 3].add(1.0))
    per_frame = (changed != plain).any(axis=(0, 2, 3, 4))
    np.testing.assert_array_equal(per_frame, [False] * 9 + [True] * 4)


def test_the_receptive_field_of_each_stage():
    """Wan2.1's, by hand: frame 401 is the first of latent 101. Its 14 frames at full rate begin
    with 387 in latent 97, the next 12 with 375 in 94. That is frame 188 at half the rate, 14 of
    which begin with 174 in latent 87, from which 24 more are needed.
    """
    cfg = wan_vae.VAEConfig()
    assert wan_vae.first_latents(cfg, 401) == [63, 87, 94, 97]
    assert wan_vae.first_latents(cfg, 20) == [0, 0, 0, 2]
    depth = wan_vae.depths(cfg, ((401, 405), (409, 410)), 110)
    expected = [0] * 63 + [1] * 24 + [2] * 7 + [3] * 3 + [4] * 7 + [0] * 6
    np.testing.assert_array_equal(depth, expected)


def test_a_stage_runs_as_far_back_as_is_needed_and_no_farther():
    """Pixels are those of decoding everything, to the last bit; they are not if any stage begins a
    latent later. The convolutions here let through only the oldest frame that they read, so that
    nothing that is missing is lost in rounding.
    """
    cfg = wan_vae.VAEConfig(base_dim=2, z_dim=2, latent_mean=(0.0,) * 2, latent_std=(1.0,) * 2)
    rng = np.random.default_rng(0)

    def oldest(path, x):
        values = rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 1)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("gamma"):
            values = np.ones(x.shape)
        elif x.ndim == 5 and x.shape[0] == 3:
            values[1:] = 0
        return jnp.asarray(values, x.dtype)

    like = wan_vae.abstract_decoder_params(cfg)
    params = jax.tree_util.tree_map_with_path(oldest, like)
    latents = jnp.asarray(rng.normal(size=(1, 64, 1, 1, 2)), jnp.float32)
    start, end = 237, 250  # in latents 60 to 63
    decode = jax.jit(partial(wan_vae.decode, cfg))

    def read(depth):
        _, cache = decode(params, latents[:, :1])
        pixels, _ = decode(params, latents[:, 1:], cache, jnp.asarray(depth[1:]))
        return np.asarray(pixels)[:, start - 1 : end - 1]

    whole = read(np.full(64, cfg.stages, np.int32))
    depth = wan_vae.depths(cfg, ((start, end),), 64)
    np.testing.assert_array_equal(read(depth), whole)
    firsts = wan_vae.first_latents(cfg, start)
    assert firsts == sorted(set(firsts)) and firsts[0] > 0
    for stage, first in enumerate(firsts):
        late = depth.copy()
        late[first] = stage
        assert np.any(read(late) != whole), f"stage {stage}"


def test_full_size_has_the_published_tensors(golden_dir):
    cfg = wan_vae.VAEConfig()
    shapes = jax.tree.map(
        lambda x: x.shape, wan_vae.abstract_params(cfg), is_leaf=lambda x: hasattr(x, "shape")
    )
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    assert sum(int(np.prod(shape)) for shape in flat.values()) == 126_892_531
    assert len(flat) == 194
    published = json.loads((golden_dir / "lora_names.json").read_text())
    listed = next(v for v in published.values() if isinstance(v, dict) and "conv2.weight" in v)
    table = wan_vae_weights.vae_table(cfg)
    assert table.keys() == listed.keys()
    for name, shape in listed.items():
        ours = wan_vae_weights.to_ours(table[name], np.empty(shape, np.bool_))
        assert ours.shape == flat[table[name]], name
    assert wan_vae_weights.config_from_shapes(listed) == cfg


def test_the_decoder_needs_no_parameter_of_the_encoder(ours):
    """Only the parameters that a run loads; they are all that the decoder has."""
    cfg, params = ours
    decoder = {name: params[name] for name in wan_vae.abstract_decoder_params(cfg)}
    assert params.keys() - decoder.keys() == set(wan_vae.ENCODER)
    z = jax.random.normal(jax.random.key(4), (1, 2, 2, 2, cfg.z_dim))
    pixels, _ = wan_vae.decode(cfg, decoder, z)
    np.testing.assert_array_equal(pixels, wan_vae.decode(cfg, params, z)[0])
    init = partial(wan_vae.WanVAE(cfg).init, first=True, method="decode")
    like = jax.eval_shape(init, jax.random.key(0), z)["params"]
    chex.assert_trees_all_equal(like, wan_vae.abstract_decoder_params(cfg))
    full_size = jax.tree.leaves(wan_vae.abstract_decoder_params(wan_vae.VAEConfig()))
    assert sum(x.size for x in full_size) == 73_295_603


def test_wrong_videos_and_checkpoints_are_refused(ours):
    cfg, params = ours
    wrong = r"8 frames, 16x20: expected 1 \+ 4 k frames and multiples of 8"
    with pytest.raises(ValueError, match=wrong):
        wan_vae.encode(cfg, params, jnp.zeros((1, 8, 16, 20, 3)))
    with pytest.raises(ValueError, match="not a Wan VAE: there is no encoder.conv1.weight"):
        wan_vae_weights.config_from_shapes({"decoder.conv1.weight": (1,)})
