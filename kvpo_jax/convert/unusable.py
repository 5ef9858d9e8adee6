"""Checkpoints that are known and cannot be converted: what each is, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvpo_jax.convert.tensors import Tensor
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime.weight_file import DTYPES, unknown_dtype

_MERGE = (
    "merge it into its base with the tool that made it, and convert the merged weights instead of"
    " the base"
)
_T2V = "bring a text-to-video Wan2.1, of 1.3B or 14B, or a model that was made of it"
_UNQUANTISED = "bring the weights in bfloat16, float16 or float32"
# What a checkpoint is, and what to do -> how the cleaned names of its tensors show it.
_MARKS = {
    "a shard of FSDP; gather the shards into one state dict and save that": r"(^|\.)_?flat_param",
    f"a DoRA, whose magnitudes no LoRA has; {_MERGE}": (
        r"\.(dora_scale|lora_magnitude_vector)(\.|$)"
    ),
    f"an adapter of LyCORIS (LoKr, LoHa, OFT and so on), not a LoRA; {_MERGE}": (
        r"\.(lokr|hada|oft|boft|ia3|glora)_|\.lora_mid\."
    ),
    f"a LoRA that changes whole weights or biases too (diff, diff_b); {_MERGE}": (
        r"\.(diff|diff_b|diff_m|set_weight|reshape_weight)$|\.lora_[AB]\.bias$"
    ),
    "a LoRA that adapts the text encoder too; bring one of the transformer alone": (
        r"^lora_te\d*_|^text_model\..*\.lora_"
    ),
    f"scaled float8 (fp8_scaled), which is not read; {_UNQUANTISED}": (
        r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$"
    ),
    f"quantised; {_UNQUANTISED}": (
        r"\.(absmax|quant_map|SCB|qweight|qzeros|wscales)$|\.quant_state\."
    ),
    f"VACE, a Wan that takes videos and masks; {_T2V}": r"(^|_)vace_",
    f"an image-to-video Wan; {_T2V}": (
        r"^img_emb[._]|(^|[._])image_embedder\.|[._]([kv]_img|add_[kv]_proj|norm_k_img|norm_added_k)\."
    ),
    f"a Wan with inputs of its own (Fun Control, S2V, Animate, camera); {_T2V}": (
        r"^(control_adapter|ref_conv|audio_|casual_audio_|face_|motion_encoder|pose_patch"
        r"|cond_encoder|frame_packer|trainable_cond_mask)|\.cam_"
    ),
    "CLIP as image-to-video Wan has it, with another text tower; nothing here needs it": (
        r"^(visual\.transformer\.\d|textual\.)"
    ),
    "Wan2.2's VAE, of another design and with 48 channels; bring Wan2.1_VAE.pth": (
        r"^(encoder|decoder)\.(down|up)samples\.\d+\.(down|up)samples\."
        r"|^encoder\.down_blocks\.\d+\.(resnets|downsampler)\."
        r"|^decoder\.up_blocks\.\d+\.upsampler\."
    ),
}


def refuse_unusable(tensors: Mapping[str, Tensor]) -> None:
    """UsageError that says what a known checkpoint is that cannot be converted, and what to do.

    Args:
      tensors: by cleaned name.
    """
    for sentence, mark in _MARKS.items():
        found = [t.name for name, t in tensors.items() if re.search(mark, name)]
        if found:
            raise UsageError(f"this is {sentence} ({len(found)} tensors, such as {found[0]})")


def check_format(tensor: Tensor) -> None:
    """UsageError unless the numbers of a tensor are of a format that is converted."""
    if tensor.array.dtype in DTYPES.values():
        return
    name = tensor.array.dtype.name
    if name.startswith("float8"):
        raise UsageError(f"this is float8 ({tensor.name} is of type {name}); {_UNQUANTISED}")
    raise unknown_dtype(tensor.file, tensor.name, name)
