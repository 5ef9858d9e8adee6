"""Which source tensors make which of ours, for a checkpoint of any kind.

To convert a new model, write its weight map as a `Kind` and list it in KINDS.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from kvpo_jax.convert.kind import Checkpoint, Kind, Options
from kvpo_jax.convert.reward_weights import HPSV3, VIDEOALIGN
from kvpo_jax.convert.table import adapter_of, check_names, clean_name
from kvpo_jax.convert.tensors import Tensor, unique
from kvpo_jax.convert.umt5_weights import UMT5
from kvpo_jax.convert.unusable import check_format, refuse_unusable
from kvpo_jax.convert.vit_weights import AESTHETIC, CLIP, DINO
from kvpo_jax.convert.wan_lora_weights import WAN_LORA
from kvpo_jax.convert.wan_vae_weights import WAN_VAE
from kvpo_jax.convert.wan_weights import WAN
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime.weight_file import Stored, check_finite

KINDS: dict[str, Kind[Any]] = {
    "wan_lora": WAN_LORA,
    "wan": WAN,
    "wan_vae": WAN_VAE,
    "clip": CLIP,  # before UMT5, as whose its token embedding would pass
    "umt5": UMT5,
    "hpsv3": HPSV3,
    "videoalign": VIDEOALIGN,
    "dino": DINO,
    "aesthetic": AESTHETIC,
}
Layers = Mapping[int | None, Tensor]  # layer of one of our tensors, or None -> its source


@dataclasses.dataclass(frozen=True)
class Mapped:
    """What a conversion does.

    Attributes:
      kind: the kind of the weights, a key of KINDS.
      config: the model's config, as the converted file notes it.
      tensors: what is written.
      sources: our name -> layer, or None if it is not stacked -> source tensor.
      aside: source tensors that our model lacks.
    """

    kind: str
    config: dict[str, Any]
    tensors: list[Stored]
    sources: dict[str, Layers]
    aside: list[Tensor]


def map_tensors(tensors: Sequence[Tensor], options: Options) -> Mapped:
    """Finds the kind of a checkpoint's tensors, and what becomes of each.

    Args:
      tensors: all tensors of the checkpoint.
      options: what the user says about it.

    Raises:
      UsageError: a tensor is missing, left over, or has another shape than the model's; the message
        names file and tensor.
    """
    files = sorted({t.file for t in tensors})
    place = ", ".join(map(str, files))
    try:
        _check_adapters(tensors)
        cleaned = unique((clean_name(t.name), t) for t in tensors)
        refuse_unusable(cleaned)
        kind = find_kind(cleaned, options.kind)
        named, aside, options = _official(KINDS[kind], cleaned, options)
        shapes = {name: t.array.shape for name, t in named.items()}
        cfg = KINDS[kind].config(Checkpoint(shapes, files, options))
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error
    table = KINDS[kind].table(cfg)
    check_names(place, named, table)
    sources: dict[str, dict[int | None, Tensor]] = {}
    for name, (path, layer) in table.items():
        sources.setdefault(path, {})[layer] = named[name]
    if hasattr(cfg, "dtype"):  # a LoRA's config has none
        cfg = dataclasses.replace(cfg, dtype=_model_dtype(named, options.dtype))
    stored = _store_all(KINDS[kind], cfg, sources, options.dtype == "keep")
    noted = KINDS[kind].sizes or tuple(vars(cfg))
    config = {name: value for name, value in dataclasses.asdict(cfg).items() if name in noted}
    return Mapped(kind, config, stored, dict(sources), aside)


def _check_adapters(tensors: Sequence[Tensor]) -> None:
    """UsageError for a file with several adapters of peft."""
    names = {name for t in tensors if (name := adapter_of(t.name)) is not None}
    if len(names) > 1:
        raise UsageError(f"it has the adapters {', '.join(sorted(names))}; save one of them alone")


def find_kind(tensors: Mapping[str, Tensor], asked: str) -> str:
    """The kind that the cleaned names of a checkpoint show.

    Args:
      tensors: by cleaned name.
      asked: the kind that it must be, or "auto".
    """
    marked = (k for k, spec in KINDS.items() if any(re.search(spec.mark, n) for n in tensors))
    kind = next(marked, None)
    if kind is None:
        names = sorted(t.name for t in tensors.values())
        raise UsageError(
            f"not a checkpoint of {', '.join(KINDS)}: it has {len(names)} tensors,"
            f" {', '.join(names[:3])} and so on"
        )
    if asked not in ("auto", kind):
        raise UsageError(f"the kind is {kind}, not {asked}")
    return kind


def _official(
    spec: Kind[Any], cleaned: Mapping[str, Tensor], options: Options
) -> tuple[dict[str, Tensor], list[Tensor], Options]:
    """(the tensors to convert by official name, those that are set aside, the options for them)."""
    aside = {name: t for name, t in cleaned.items() if spec.aside and re.search(spec.aside, name)}
    kept = {name: t for name, t in cleaned.items() if name not in aside}
    for name, tensor in kept.items():
        if not name.endswith(".alpha"):  # a single number, of any format
            check_format(tensor)
    if spec.merge is not None:
        kept, options = spec.merge(kept, options)
    official = spec.official({name: t.array.shape for name, t in kept.items()})
    named = unique((official(name), t) for name, t in kept.items())
    return named, list(aside.values()), options


def _model_dtype(named: Mapping[str, Tensor], asked: str) -> str:
    """The number format of the model: what is asked for, or the largest tensor's."""
    if asked != "keep":
        return asked
    largest = max((t.array for t in named.values()), key=lambda array: array.nbytes)
    return largest.dtype.name


def _store_all(
    spec: Kind[Any], cfg: Any, sources: Mapping[str, Layers], keep: bool
) -> list[Stored]:
    """All of our tensors, each made from its source tensors when it is written.

    Args:
      spec: the kind of the weights.
      cfg: the model's config.
      sources: our name -> source tensors, in the order of the layers.
      keep: whether tensors keep the sources' number format instead of the model's.
    """
    stored = []
    for path, like in flax.traverse_util.flatten_dict(spec.abstract(cfg), sep="/").items():
        layers = sources[path]
        expected = like.shape if None in layers else like.shape[1:]
        for tensor in layers.values():
            shape = spec.to_ours(path, tensor.array).shape
            if shape != expected:
                raise UsageError(
                    f"{tensor} makes {path} {list(shape)}; the others make it {list(expected)}: "
                    f"{cfg}"
                )
        dtype = _common_dtype(path, layers) if keep else np.dtype(like.dtype)
        parts = tuple(functools.partial(_convert, spec, path, t) for t in layers.values())
        stored.append(Stored(path, like.shape, dtype, parts))
    return stored


def _common_dtype(path: str, layers: Layers) -> np.dtype:
    """The number format of our tensor's sources; UsageError if they have several."""
    dtypes = {t.array.dtype for t in layers.values()}
    if len(dtypes) > 1:
        files = ", ".join(sorted({str(t.file) for t in layers.values()}))
        names = ", ".join(sorted(dtype.name for dtype in dtypes))
        raise UsageError(
            f"{files}: the layers of {path} are of the types {names}; choose one with --dtype"
        )
    return dtypes.pop()


def _convert(spec: Kind[Any], path: str, tensor: Tensor) -> np.ndarray:
    """A source tensor in the layout of our `path`; UsageError if it is not finite."""
    numbers = tensor.read()
    check_finite(str(tensor), numbers)
    return spec.to_ours(path, numbers)


def describe(mapped: Mapped) -> str:
    """A line per source tensor, which says what it is and what it becomes.

    The lines are as long as they must be, for grep and diff.
    """
    lines = []
    for stored in mapped.tensors:
        for layer, tensor in mapped.sources[stored.name].items():
            ours = stored.name if layer is None else f"{stored.name}[{layer}]"
            shape = stored.shape if layer is None else stored.shape[1:]
            becomes = (ours, signature(stored.dtype, shape))
            lines.append((tensor.name, signature_of(tensor), "->", *becomes))
    lines += [(t.name, signature_of(t), "->", "(not used)", "") for t in mapped.aside]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def signature(dtype: np.dtype, shape: Sequence[int]) -> str:
    """A tensor's number format and shape, as in "float32[96, 96]"."""
    return f"{dtype.name}{list(shape)}"


def signature_of(tensor: Tensor) -> str:
    """The signature of a source tensor."""
    return signature(tensor.array.dtype, tensor.array.shape)
