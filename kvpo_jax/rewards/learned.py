"""What HPSv3 and VideoAlign have in common: loading, the text around a clip, scoring in batches
over the devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.data.text import load_tokenizer
from kvpo_jax.errors import UsageError
from kvpo_jax.models import layers, reward_model
from kvpo_jax.models.qwen2_vl import Tokens
from kvpo_jax.models.reward_model import PAD_TOKENS, RewardConfig
from kvpo_jax.rewards import preprocess
from kvpo_jax.rewards.composite import Shared
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.types import Array, PyTree

# Qwen2-VL's chat up to the instruction, with the default system turn; what follows the instruction
# is never computed.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>{instruction}"
)

Encode = Callable[[str], list[int]]
Resize = Callable[[Array, tuple[int, int]], Array]
Clips = Callable[[np.ndarray], Array]


@struct.dataclass
class RewardModel:
    """A loaded reward model.

    Attributes:
      params: its weights, on every device of the mesh.
      cfg: its config.
      encode: text -> token ids.
      mesh: the devices that it runs on; rows lie over all of them.
      batch: texts that a device takes at once, at most.
    """

    params: PyTree
    cfg: RewardConfig = struct.field(pytree_node=False)
    encode: Encode = struct.field(pytree_node=False)
    mesh: Mesh = struct.field(pytree_node=False)
    batch: int = struct.field(pytree_node=False)


# ---------------------------------------------------------------- loading


def tokenizer_folder(weights: Path | str) -> Path:
    """Where kvpo-convert puts the tokenizer that belongs to a weight file."""
    weights = Path(weights)
    return weights.with_name(f"{weights.stem}_tokenizer")


def tokenizer(folder: Path | str, tokens: Sequence[str]) -> tuple[Encode, dict[str, int]]:
    """The tokenizer in a local folder with reward tokens added, as upstream does; nothing is
    downloaded.

    Args:
      folder: a folder of Qwen2-VL, or of its tokenizer alone.
      tokens: the reward tokens.

    Returns:
      text -> token ids, and the ids of the reward tokens and of the pad tokens.

    Raises:
      FileNotFoundError, ImportError, ValueError: see `text.load_tokenizer`; ValueError too if it is
        not Qwen2-VL's.
    """
    made = load_tokenizer(folder, ("tokenizer.json", "vocab.json"), "a folder of Qwen2-VL")
    made.add_tokens(list(tokens), special_tokens=True)

    def encode(text):
        return made(text, add_special_tokens=False).input_ids

    ids = {}
    for token in (*PAD_TOKENS.values(), *tokens):
        ids[token], *more = encode(token)
        if more:
            raise UsageError(
                f"the tokenizer in {folder} has no token {token}: it is not Qwen2-VL's"
            )
    return encode, ids


def load(
    path: Path | str,
    kind: str,
    config: type[RewardConfig],
    tokenizer_path: Path | str | None,
    mesh: Mesh | None,
    batch: int,
) -> RewardModel:
    """A reward model that kvpo-convert wrote.

    Args:
      path: of the weights.
      kind: "hpsv3" or "videoalign".
      config: the kind's.
      tokenizer_path: folder of the tokenizer; None is `tokenizer_folder`.
      mesh: to run on; None is `local_mesh`.
      batch: texts that a device takes at once.

    Raises:
      ValueError: the file is of another kind, not whole, or does not belong to the tokenizer.
      FileNotFoundError: there is no tokenizer.
    """
    cfg = checkpoint.noted_config(path, kind, config)
    folder = tokenizer_path or tokenizer_folder(path)
    encode, ids = tokenizer(folder, cfg.tokens)
    if (known := _special_ids(cfg)) != ids:
        raise UsageError(
            f"the tokenizer in {folder} has the ids {ids}, {path} was made with {known}"
        )
    mesh = mesh or local_mesh()
    params = load_params(path, reward_model.abstract_params(cfg), mesh)
    return RewardModel(params, cfg, encode, mesh, batch)


def local_mesh() -> Mesh:
    """All devices of this process, which scores its own part of a batch."""
    return Mesh(np.asarray(jax.local_devices()), ("data",))


def load_params(path: Path | str, abstract: PyTree, mesh: Mesh) -> PyTree:
    """The weights in a file, of these shapes, on every device of the mesh."""
    place = NamedSharding(mesh, sharding.REPLICATED)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    return checkpoint.load_weights(path, like)


def _special_ids(cfg: RewardConfig) -> dict[str, int]:
    return {token: getattr(cfg, field) for field, token in PAD_TOKENS.items()} | dict(
        zip(cfg.tokens, cfg.token_ids, strict=True)
    )


# ---------------------------------------------------------------- text


def texts(reward: RewardModel, prompts: Sequence[str], pad: int, visual: int) -> list[list[int]]:
    """The token ids of the chat with each prompt.

    Args:
      reward: whose instruction and tokenizer.
      prompts: sentences.
      pad: the pad token of its clips, images or videos.
      visual: tokens of a clip.

    Raises:
      ValueError: a prompt has one of the tokens that mark something else; names both.
    """
    template, special = reward.cfg.template, _special_ids(reward.cfg)
    mark_of_clip = next(token for token, number in special.items() if number == pad)

    @functools.cache
    def ids(prompt: str) -> list[int]:
        for token in special:
            if token in prompt:
                raise UsageError(f"the prompt {prompt!r} has the special token {token}")
        text = _CHAT.format(pad=mark_of_clip, instruction=template.format(text_prompt=prompt))
        return [
            number for i in reward.encode(text) for number in ([pad] * visual if i == pad else [i])
        ]

    return [ids(prompt) for prompt in prompts]


# ---------------------------------------------------------------- scores


@functools.cache
def scoring_step(
    cfg: RewardConfig, mesh: Mesh, resize: Resize
) -> Callable[[PyTree, Tokens, Array], Array]:
    """The compiled part: (params, tokens, uint8[n, frames, h, w, 3]) -> `reward_model.raw_scores`.

    Args:
      cfg: of the model.
      mesh: each device scores its own rows.
      resize: `preprocess.resize_pil` or `resize_torch`.
    """
    rows = Spec(mesh.axis_names)

    def score_rows(params: PyTree, tokens: Tokens, clips: Array) -> Array:
        grid = preprocess.grid(cfg, *clips.shape[1:4])
        height, width = (side * cfg.vision.patch for side in grid[1:])
        resized = resize(clips, (height, width))
        patches = preprocess.patchify(preprocess.normalise(resized), cfg.vision)
        return reward_model.raw_scores(cfg, params, tokens, patches, grid)

    sharded = jax.shard_map(
        score_rows, mesh=mesh, in_specs=(sharding.REPLICATED, rows, rows), out_specs=rows
    )
    return jax.jit(layers.exact(sharded))


def equal_parts(count: int, most: int) -> int:
    """The size of the parts of `count` rows: as few as `most` allows, then as small as can be."""
    return -(-count // -(-count // most))


def raw_scores(
    reward: RewardModel,
    resize: Resize,
    tokens: Tokens,
    text_of_row: np.ndarray,
    clips: Clips,
    at_once: int,
) -> Array:
    """Scores any number of clips with their texts, float32[rows, wanted, outputs].

    Args:
      reward: the model.
      resize: see `scoring_step`.
      tokens: of some texts.
      text_of_row: int[rows], the text of each row.
      clips: indices of rows -> uint8[n, frames, h, w, 3].
      at_once: rows that a device takes at once. The program is compiled for each such number.
    """

    def inputs(row: np.ndarray) -> tuple[Tokens, Array]:
        return jax.tree.map(lambda x: x[text_of_row[row]], tokens), clips(row)

    step = functools.partial(scoring_step(reward.cfg, reward.mesh, resize), reward.params)
    return in_batches(step, inputs, reward.mesh, len(text_of_row), at_once)


def in_batches(
    step: Callable[..., Array],
    inputs: Callable[[np.ndarray], tuple[PyTree, ...]],
    mesh: Mesh,
    rows: int,
    at_once: int,
) -> Array:
    """What a compiled step makes of so many rows, in batches of one size.

    The last batch is filled up.

    Args:
      step: of the inputs of a batch, arrays whose rows lie over the devices.
      inputs: indices of rows -> their inputs.
      mesh: the devices.
      rows: how many.
      at_once: rows that a device takes at once. The step is compiled for each such number.
    """
    place = NamedSharding(mesh, Spec(mesh.axis_names))
    batch, out = at_once * mesh.size, []
    for start in range(0, rows, batch):
        row = np.minimum(np.arange(start, start + batch), rows - 1)
        out.append(step(*jax.device_put(inputs(row), place)))
    return jnp.concatenate(out)[:rows]


# ---------------------------------------------------------------- frames


def distinct_frames(
    videos: int, frames: int, shared: Shared | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(video, frame, which): every distinct frame once, int[distinct], and which of them is each
    frame of each video in turn, int[videos * frames].

    A frame that several videos share is the first one's of them.
    """
    video, frame = np.divmod(np.arange(videos * frames), frames)
    if shared:
        video = np.where(frame < shared.frames, video - video % shared.clips, video)
    distinct, which = np.unique(video * frames + frame, return_inverse=True)
    return *np.divmod(distinct, frames), which


def frames_at_once(videos: int, frames: int, mesh: Mesh, most: int) -> int:
    """Frames that a device takes at once, at most `most`.

    It does not depend on how many are shared, so that every fork is scored by one program.
    """
    return min(equal_parts(frames, most), -(-videos * frames // mesh.size))
