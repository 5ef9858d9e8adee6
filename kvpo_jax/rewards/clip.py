"""CLIP: how well frames fit their sentence, and VBench's background consistency.

    scorer = clip.load("weights/clip.safetensors")
    scorer(pixels, prompts)["clip_score"]

The papers take ViT-B/32; any CLIP of its form is scored. docs/evaluation.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import chex
import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from kvpo_jax.data import text
from kvpo_jax.errors import UsageError
from kvpo_jax.models import vit
from kvpo_jax.models.layers import exact
from kvpo_jax.rewards import features, learned, preprocess
from kvpo_jax.rewards.composite import Scorer, Shared
from kvpo_jax.runtime import sharding
from kvpo_jax.types import Array, PyTree

FRAMES = 8  # of a clip that clip_score looks at, as VBench's script
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

# Sentences -> (token ids int32[n, K], where each ends int32[n]).
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@struct.dataclass
class CLIP:
    """A loaded CLIP.

    Attributes:
      tower: its image tower, and the weights of both towers.
      encode: its tokenizer.
    """

    tower: features.Tower
    encode: Encode = struct.field(pytree_node=False)


def side_of(cfg: vit.VisionConfig) -> int:
    """Pixels of the square that CLIP looks at: that which it has positions for."""
    return cfg.pixels


READING = features.Reading(preprocess.for_clip, side_of, vit.image_features)


def tokenizer(folder: Path | str, cfg: vit.TextConfig) -> Encode:
    """CLIP's tokenizer in a local folder, for sentences of at most `cfg.context` tokens.

    Sentences are cleaned as OpenAI's code does it; a longer one is cut, and ends all the same.

    Raises:
      FileNotFoundError, UsageError: see `text.load_tokenizer`; UsageError too if it is not that of
        the weights.
    """
    made = text.load_tokenizer(
        folder, TOKENIZER_FILES, "a folder of CLIP in transformers' layout", "CLIPTokenizer"
    )
    if len(made) > cfg.vocab:
        raise UsageError(
            f"the tokenizer in {folder} has {len(made)} tokens, the weights {cfg.vocab}: they do"
            " not belong together"
        )

    def encode(sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = made(
            [text.clean(sentence) for sentence in sentences],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=cfg.context,
            return_tensors="np",
        )["input_ids"].astype(np.int32)
        # The first of them: what pads a text may be the token that ends it.
        return ids, (ids == made.eos_token_id).argmax(axis=1).astype(np.int32)

    return encode


def load(
    path: Path | str,
    tokenizer_folder: Path | str | None = None,
    mesh: Mesh | None = None,
    batch: int = features.BATCH,
) -> Scorer:
    """The scorer of a converted CLIP.

    Its components, each float[n]:

    clip_score: 100 times the mean cosine of sentence and frame, over FRAMES frames of the clip.
    clip_score_all: the same over all frames.
    background_consistency: in [0, 1], see `features.consistency`.

    Args:
      path: weights that `kvpo-convert` wrote.
      tokenizer_folder: None is the folder that was written with the weights.
      mesh: the devices to run on; None is all devices of this process.
      batch: frames that a device takes at once.
    """
    tower = features.load(path, "clip", vit.CLIPConfig, mesh, batch)
    assert isinstance(tower.cfg, vit.CLIPConfig)
    folder = tokenizer_folder or learned.tokenizer_folder(path)
    return partial(score, CLIP(tower, tokenizer(folder, tower.cfg.text)))


@cache
def text_step(cfg: vit.CLIPConfig, mesh: Mesh) -> Callable[..., Array]:
    """The compiled part: (params, ids, ends) -> `vit.text_features`; each device has its own."""
    rows = Spec(mesh.axis_names)

    def read(params: PyTree, ids: Array, ends: Array) -> Array:
        return vit.text_features(cfg, params, ids, ends)

    sharded = jax.shard_map(
        read, mesh=mesh, in_specs=(sharding.REPLICATED, rows, rows), out_specs=rows
    )
    return jax.jit(exact(sharded))


def of_texts(clip: CLIP, sentences: Sequence[str]) -> Array:
    """The features of sentences, float32[n, width]; equal ones are read once."""
    tower = clip.tower
    assert isinstance(tower.cfg, vit.CLIPConfig), "made by `load`"
    distinct = list(dict.fromkeys(map(str, sentences)))
    ids, ends = clip.encode(distinct)
    out = learned.in_batches(
        partial(text_step(tower.cfg, tower.mesh), tower.params),
        lambda rows: (ids[rows], ends[rows]),
        tower.mesh,
        rows=len(distinct),
        at_once=1,  # there are few, and any number of them takes one program
    )
    return out[np.array([distinct.index(str(sentence)) for sentence in sentences])]


def score(
    clip: CLIP, pixels: Array, prompts: Sequence[str], shared: Shared | None = None
) -> dict[str, Array]:
    """Scores of clips [n, frames, h, w, 3], float in [0, 1] or uint8; see `load`."""
    chex.assert_shape(pixels, (len(prompts), None, None, None, 3))
    seen = features.of_frames(clip.tower, READING, pixels, shared)
    some, every = _fit(seen, of_texts(clip, prompts))
    return {
        "clip_score": some,
        "clip_score_all": every,
        "background_consistency": features.consistency(seen),
    }


@jax.jit
def _fit(seen: Array, texts: Array) -> tuple[Array, Array]:
    """100 times the mean cosine of some and of all frames with their text, float32[n] each.

    Args:
      seen: features of frames, float32[n, frames, width].
      texts: features of texts, float32[n, width].
    """
    fit = 100 * features.cosine(seen, texts[:, None])
    some = np.array(preprocess.middle_frames(seen.shape[1], FRAMES))
    return fit[:, some].mean(axis=1), fit.mean(axis=1)
