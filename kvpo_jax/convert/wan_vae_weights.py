"""The weight map of Wan's VAE: where each tensor of a checkpoint goes in our variable tree.

Official names are those of Wan2.1's `Wan2.1_VAE.pth`. `official_name` makes them from those of
diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import numpy as np

from kvpo_jax.convert.kind import Checkpoint, Kind
from kvpo_jax.convert.sources import read_configs
from kvpo_jax.convert.table import Shapes, Table, unchanged
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan_vae import VAEConfig, abstract_params

_LEAVES = {"kernel": "weight", "bias": "bias", "gamma": "gamma"}
# Field of VAEConfig -> its name in diffusers' config.json.
_LATENT_STATISTICS = {"latent_mean": "latents_mean", "latent_std": "latents_std"}
# What turns diffusers' names into official ones, in this order.
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


def vae_table(cfg: VAEConfig) -> dict[str, str]:
    """official name -> our path, for every tensor.

    decoder.upsamples.0.residual.2.weight goes to decoder/upsamples_0/residual_2/kernel.
    """
    paths = flax.traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    return {_official_of_path(path): path for path in paths}


def _official_of_path(path: str) -> str:
    """The official name of the tensor that goes to our `path`."""
    *modules, leaf = path.split("/")
    numbered = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*numbered, _LEAVES[leaf]])


def to_ours(path: str, tensor: np.ndarray) -> np.ndarray:
    """An official tensor in the layout of our `path`.

    Convolutions have their channels last, gammas have one axis.
    """
    if path.endswith("kernel"):
        return np.moveaxis(tensor, (0, 1), (-1, -2))
    return tensor.reshape(-1)


# ---------------------------------------------------------------- names


def official_name(name: str, cfg: VAEConfig) -> str:
    """The official name of a tensor of diffusers' AutoencoderKLWan."""
    per_stage = cfg.num_res_blocks + 2  # modules of a decoder stage, with the upsampling

    def module_number(match: re.Match[str]) -> str:
        inside = per_stage - 1 if match[2] is None else int(match[2])
        return f".upsamples.{int(match[1]) * per_stage + inside}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.", module_number, name)
    for pattern, official in _DIFFUSERS:
        name = re.sub(pattern, official, name)
    return name


def official_names(shapes: Shapes) -> Callable[[str], str]:
    """(cleaned name -> official name), for a VAE whose tensors have these names and shapes.

    The number of a decoder module depends on the sizes, which the encoder's tensors show.
    """
    if "conv1.weight" in shapes:
        return unchanged
    any_size = functools.partial(official_name, cfg=VAEConfig())
    encoder = {
        any_size(name): shape
        for name, shape in shapes.items()
        if name.startswith(("encoder.", "post_quant_conv."))
    }
    return functools.partial(official_name, cfg=config_from_shapes(encoder))


# ---------------------------------------------------------------- config


def config_from_shapes(shapes: Shapes) -> VAEConfig:
    """The sizes of the VAE whose tensors, by official name, have these shapes.

    No checkpoint has the statistics of the latents: with z_dim 16 they are Wan2.1's, else 0 and 1.

    Raises:
      UsageError: it names the tensor that is missing.
    """
    try:
        base, z_dim = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        last = shapes["encoder.head.0.gamma"][0]
    except KeyError as error:
        raise UsageError(f"not a Wan VAE: there is no {error.args[0]}") from error
    found = re.compile(r"encoder\.downsamples\.(\d+)\.resample\.1\.weight")
    halvings = sorted(int(match[1]) for match in map(found.fullmatch, shapes) if match)
    if not halvings:
        raise UsageError("not a Wan VAE: there is no encoder.downsamples.N.resample.1.weight")
    widths = [shapes[f"encoder.downsamples.{i}.resample.1.weight"][0] for i in halvings]
    cfg = VAEConfig(
        base_dim=base,
        z_dim=z_dim,
        dim_mult=tuple(width // base for width in (*widths, last)),
        num_res_blocks=halvings[0],
        temporal_downsample=tuple(
            f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in halvings
        ),
    )
    if z_dim == 16:
        return cfg
    return dataclasses.replace(cfg, latent_mean=(0.0,) * z_dim, latent_std=(1.0,) * z_dim)


def config_from_checkpoint(checkpoint: Checkpoint) -> VAEConfig:
    """The VAE's config, with the statistics of the latents that a diffusers folder states."""
    stated = read_configs(checkpoint.files)
    statistics: dict[str, Any] = {
        ours: tuple(stated[theirs])
        for ours, theirs in _LATENT_STATISTICS.items()
        if theirs in stated
    }
    return dataclasses.replace(config_from_shapes(checkpoint.shapes), **statistics)


def _table(cfg: VAEConfig) -> Table:
    return {official: (path, None) for official, path in vae_table(cfg).items()}


WAN_VAE = Kind(
    mark=r"^decoder\.(conv1|conv_in)\.weight$",
    official=official_names,
    config=config_from_checkpoint,
    table=_table,
    to_ours=to_ours,
    abstract=abstract_params,
    folder="vae",
    pattern="*VAE*.pth",
)
