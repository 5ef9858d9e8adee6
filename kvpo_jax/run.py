"""A run's equipment, assembled once for every command, tool and test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import ml_collections
from clu.parameter_overview import count_parameters
from jax.sharding import Mesh

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import programs as programs_lib
from kvpo_jax.algorithm import keys, routing
from kvpo_jax.backbone import Backbone
from kvpo_jax.decoder import VideoDecoder
from kvpo_jax.errors import UsageError
from kvpo_jax.programs import Programs
from kvpo_jax.rewards import composite
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding, sums
from kvpo_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first iteration to the last.

    Attributes:
      config: the checked configuration.
      mesh: of the devices.
      backbone: the generator's world: weights, prompts, text, pixels, rewards.
      params: the frozen base weights, on the mesh as `sharding.weight_specs` says.
      programs: compiled for config and mesh.
      decoder: latents to pixels.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    backbone: Backbone
    params: PyTree
    programs: Programs
    decoder: VideoDecoder

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """What names it -> the checksum of every file that the run's numbers depend on.

        Of reward servers the sum of what they say of themselves.
        """
        files = {
            name: sums.of_path(path) for name, path in backbone_lib.files_read(self.config).items()
        }
        versions = {
            f"{field} {name}": sums.of_json(said)
            for field, listed in (
                ("reward.scorer", self.backbone.rewards),
                ("eval.scorer", self.backbone.watch),
            )
            for name, said in listed.versions().items()
        }
        return files | versions

    def variables(self, lora: PyTree) -> PyTree:
        """What the programs take as the policy with this LoRA tree."""
        return {"params": self.params, "lora": lora}

    def initial_lora(self) -> PyTree:
        """The adapter that every policy starts from: config.paths.lora, or a fresh one."""
        lora = self.backbone.load_lora(None)
        if lora is not None:
            return lora
        return programs_lib.fresh_lora(self.config, keys.draw_key(self.config.seed, "lora", 0))

    def describe(self, lora: PyTree) -> str:
        """What runs where, in a line."""
        config = self.config
        prompts, branches = config_lib.prompts_at_once(config), config_lib.branches_at_once(config)
        return (
            f"{config.backbone}: {count_parameters(self.params):,} parameters, "
            f"{count_parameters(lora):,} in LoRA; "
            f"{sharding.describe(self.mesh, prompts, branches)}; "
            f"{len(self.pivots)} of {config.video.blocks} blocks can be the pivot"
        )

    @functools.cached_property
    def pivots(self) -> tuple[int, ...]:
        """The blocks at which a perturbed window may begin (`eligible_pivots`)."""
        return eligible_pivots(self.config, self.backbone.to_pixel)

    def draw_pivot(self, iteration: int) -> int:
        """The first perturbed block of an iteration, one for all prompts."""
        return routing.draw_pivot(keys.draw_key(self.config.seed, "pivot", iteration), self.pivots)


def make_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a run: the config's sizes, or those that use the most devices."""
    prompts, branches = config_lib.prompts_at_once(config), config_lib.split_branches(config)
    data, fsdp, branch, context = (config.mesh[axis] for axis in sharding.AXES)
    return sharding.make_mesh(data, branch, prompts, branches, devices, fsdp=fsdp, context=context)


def eligible_pivots(
    config: ml_collections.ConfigDict, to_pixel: Callable[[int], int]
) -> tuple[int, ...]:
    """The blocks at which a perturbed window may begin and enough of what is scored may change.

    Args:
      config: a checked one.
      to_pixel: the backbone's: first pixel frame of a latent frame.

    Raises:
      UsageError: there are none; it names the fields.
    """
    video, rollout, least = config.video, config.rollout, config.reward.min_behind
    window, recorded = routing.window(config.window), config_lib.recorded_blocks(config)
    switches = tuple(video.switch_frames)
    possible = routing.eligible_pivots(
        window,
        video.blocks,
        video.block_frames,
        switches,
        rollout.branches,
        rollout.window_blocks,
        recorded,
    )
    if not possible:
        raise UsageError(
            f"no block can be a pivot of config.video.blocks={video.blocks}, with"
            f" config.video.block_frames={video.block_frames},"
            f" config.video.switch_frames={switches},"
            f" {recorded} replayed blocks, config.rollout.branches={rollout.branches} and {window}."
            " Lengthen video.blocks, shorten rollout.window_blocks or replay.blocks, or move"
            " video.switch_frames"
        )
    clips = backbone_lib.scored_clips(config, to_pixel)

    def behind(pivot: int) -> float:
        return composite.share_behind(clips, to_pixel(pivot * video.block_frames))

    pivots = tuple(pivot for pivot in possible if behind(pivot) >= least)
    if not pivots:
        raise UsageError(
            f"no block can be a pivot: at least config.reward.min_behind={least:g} of the scored"
            f" frames must lie behind it, and behind block {possible[0]}, the first that could be"
            f" one, there are {behind(possible[0]):.2f}. Lower reward.min_behind or"
            " reward.clip_spacing"
        )
    return pivots


def load(
    config: ml_collections.ConfigDict,
    mesh: Mesh | None = None,
    sentences: Sequence[str] | None = None,
) -> Run:
    """The equipment of a run with this config.

    Whatever cannot work is an error before weights are loaded: sizes for the devices, scorers,
    prompts, and files other than the weights.

    Args:
      config: a checked one.
      mesh: None is the one that the config asks for.
      sentences: the only ones that will be encoded, for a run that scores nothing: no module of a
        scorer is imported. None are the backbone's prompts, which may be in a file.

    Raises:
      UsageError: it names the field or file.
    """
    mesh = make_mesh(config) if mesh is None else mesh
    backbone = backbone_lib.load(config)
    if sentences is None:
        config_lib.heldout_at_once(config, sharding.prompt_shards(mesh))
        backbone_lib.check_rewards(config, backbone)
        if backbone.rewards.needs_groups() and sharding.splits_groups(mesh):
            raise UsageError(
                f"mesh.branch={mesh.shape['branch']} spreads the branches of a prompt over several"
                " processes, and a server of config.reward.scorer has to see them together; set"
                f" --config.mesh.branch={jax.local_device_count()} or less"
            )
        backbone.prompts("heldout", 0)
    else:
        backbone.check_sentences(sentences)
    programs = programs_lib.build(config, mesh)
    params = backbone.load_params(functools.partial(sharding.weight_sharding, mesh=mesh))
    decoder = VideoDecoder(backbone, mesh, config.video.block_frames)
    return Run(config, mesh, backbone, params, programs, decoder)
