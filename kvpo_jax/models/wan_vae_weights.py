"""Where each tensor of a Wan VAE checkpoint goes in our variable tree; see wan_weights.py."""

from __future__ import annotations

import re
from collections.abc import Mapping

import flax.traverse_util
import numpy as np

from kvpo_jax.models.wan_vae import VAEConfig, abstract_params

_OFFICIAL = {"kernel": "weight", "bias": "bias", "gamma": "gamma"}


def vae_table(cfg: VAEConfig) -> dict[str, str]:
    """official name -> our path, for every tensor: decoder.upsamples.0.residual.2.weight has its kernel at
    decoder/upsamples_0/residual_2/kernel."""

    def official(path: str) -> str:
        *modules, leaf = path.split("/")
        return ".".join([*(re.sub(r"_(\d+)$", r".\1", module) for module in modules), _OFFICIAL[leaf]])

    return {official(path): path for path in flax.traverse_util.flatten_dict(abstract_params(cfg), sep="/")}


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`: convolutions have their channels last, gammas one axis."""
    if path.endswith("kernel"):
        return np.moveaxis(tensor, (0, 1), (-1, -2))
    return tensor.reshape(-1)


_DIFFUSERS = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"(samples\.\d+|middle\.\d)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def official_name(name: str, cfg: VAEConfig) -> str:
    """The official name of a tensor of diffusers' AutoencoderKLWan."""
    per_stage = cfg.num_res_blocks + 2  # of the decoder, with the upsampling
    flat = lambda m, inner: f".upsamples.{int(m[1]) * per_stage + inner}."
    name = re.sub(r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: flat(m, int(m[2])), name)
    name = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: flat(m, per_stage - 1), name)
    for pattern, official in _DIFFUSERS:
        name = re.sub(pattern, official, name)
    return name


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """The sizes of a checkpoint from the shapes of its official names; ValueError names what does not fit.

    The latent statistics are not in a checkpoint: with z_dim 16 they are Wan2.1's, else 0 and 1.
    """
    try:
        base, z_dim = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        last = shapes["encoder.head.0.gamma"][0]
    except KeyError as error:
        raise ValueError(f"not a Wan VAE: there is no {error.args[0]}") from error
    found = re.compile(r"encoder\.downsamples\.(\d+)\.resample\.1\.weight")
    halvings = sorted(int(m[1]) for m in map(found.fullmatch, shapes) if m)
    if not halvings:
        raise ValueError("not a Wan VAE: there is no encoder.downsamples.N.resample.1.weight")
    widths = [shapes[f"encoder.downsamples.{i}.resample.1.weight"][0] for i in halvings]
    statistics = {} if z_dim == 16 else {"latent_mean": (0.0,) * z_dim, "latent_std": (1.0,) * z_dim}
    return VAEConfig(
        base_dim=base,
        z_dim=z_dim,
        dim_mult=tuple(width // base for width in (*widths, last)),
        num_res_blocks=halvings[0],
        temporal_downsample=tuple(f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in halvings),
        **statistics,
    )
