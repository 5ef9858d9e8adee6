"""A weight file that changed after it was written is refused, and says where it changed."""

import json
import os
import stat
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kvpo_jax.backbone import TOYS
from kvpo_jax.errors import UsageError
from kvpo_jax.models.umt5 import UMT5Config
from kvpo_jax.models.vit import CLIPConfig
from kvpo_jax.runtime import checkpoint, weight_file

WEIGHTS = {
    "block": {
        "kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "bias": np.array([0.5, 2.0], ml_dtypes.bfloat16),
    },
    "scale": np.float32(3.0),
}
METADATA = {"kind": "wan", "config": '{"dim": 96, "num_heads": 12}', "manifest": "made of a.pt"}


@pytest.fixture
def path(tmp_path) -> Path:
    checkpoint.save_weights(tmp_path / "w.safetensors", WEIGHTS, METADATA)
    return tmp_path / "w.safetensors"


def test_the_file_has_the_crc32_of_each_tensor(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        sums = json.loads(file.metadata()["crc32"])
        for name in file.keys():
            assert sums[name] == f"{zlib.crc32(file.get_tensor(name).tobytes()):08x}"
    opened = weight_file.open_file(path)
    assert opened.metadata == METADATA and opened.sums == sums
    assert opened.tensors["block/bias"].dtype == ml_dtypes.bfloat16


def test_no_flipped_bit_passes(path):
    """Each byte of the file in turn, header and padding too, with one of its bits flipped."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(UsageError, match="w.safetensors") as error:
            checkpoint.metadata_config(path, "wan")
            checkpoint.load_weights(path, WEIGHTS)
        message = str(error.value)
        assert "\n" not in message
        assert place < start or ("block/" in message or "scale" in message)
    path.write_bytes(whole)
    checkpoint.load_weights(path, WEIGHTS)


def test_the_message_names_file_and_tensor_and_says_what_to_do(path):
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1  # bfloat16 comes last
    path.write_bytes(whole)
    message = "w.safetensors: block/bias is damaged, its checksum is wrong; .*convert"
    with pytest.raises(UsageError, match=message):
        checkpoint.load_weights(path, WEIGHTS)
    checkpoint.load_weights(path, {"scale": WEIGHTS["scale"]}, unread=("block",))


@pytest.mark.parametrize("dtype", weight_file.DTYPES.values(), ids=weight_file.DTYPES)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error_that_names_the_tensor(tmp_path, dtype, number):
    largest = np.full((3, 2), ml_dtypes.finfo(dtype).max, dtype)
    weight_file.check_finite("a", largest)
    weight_file.check_finite("a", np.zeros((0, 2), dtype))
    tensor = largest.copy()
    tensor[2, 1] = number
    safetensors.numpy.save_file({"a": largest, "b": tensor}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"w.safetensors: b has numbers that are not finite"):
        weight_file.open_file(tmp_path / "w.safetensors").read("b")


def test_a_file_of_another_program_is_read_without_checksums(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "w.safetensors")
    loaded = checkpoint.load_weights(tmp_path / "w.safetensors", {"a": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(loaded["a"], np.ones(3))


def test_one_sum_says_whether_two_files_have_the_same_weights(path, tmp_path):
    other = tmp_path / "other.safetensors"

    def sum_of(weights=WEIGHTS, **metadata):
        checkpoint.save_weights(other, weights, {**METADATA, **metadata})
        return weight_file.sums_of(other)

    same = weight_file.sums_of(path)
    assert sum_of() == sum_of(manifest="made of b.pt") == same
    assert sum_of(config="{}") != same
    assert sum_of({**WEIGHTS, "scale": np.float32(3.5)}) != same
    assert sum_of({**WEIGHTS, "scale": np.full(1, 3, np.float32)}) != same
    assert sum_of({**WEIGHTS, "other": np.float32(3.5)}) != same
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, other, {k: METADATA[k] for k in ("kind", "config")})
    assert weight_file.sums_of(other) == same  # without stored checksums they are computed


@pytest.mark.parametrize("config", [{}, {"config": "{"}, {"config": "[1]"}])
def test_a_kind_without_a_config_is_an_error(tmp_path, config):
    checkpoint.save_weights(tmp_path / "w.safetensors", WEIGHTS, {"kind": "wan", **config})
    with pytest.raises(UsageError, match="w.safetensors says no config of its wan"):
        checkpoint.metadata_config(tmp_path / "w.safetensors", "wan")


@pytest.mark.parametrize(
    "kind, config, note, reason",
    [
        ("umt5", UMT5Config, {"width": 8}, "there is no field 'width'"),
        ("umt5", UMT5Config, {"dim": "8"}, "dim='8' is no int"),
        ("clip", CLIPConfig, {}, "missing 1 required"),
        ("clip", CLIPConfig, {"text": 3}, "3 has no fields"),
    ],
)
def test_a_note_of_other_fields_than_its_kinds_is_an_error(tmp_path, kind, config, note, reason):
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, WEIGHTS, {"kind": kind, "config": json.dumps(note)})
    with pytest.raises(UsageError, match=f"w.safetensors says no config of its {kind} .*{reason}"):
        checkpoint.noted_config(path, kind, config)


@pytest.mark.parametrize("name", [name for name, toy in TOYS.items() if toy.weights])
def test_the_shipped_weights_have_checksums(name):
    opened = weight_file.open_file(TOYS[name].weights)
    assert opened.sums.keys() == opened.tensors.keys()
    jax.tree.map(opened.read, list(opened.tensors))


def test_the_group_can_read_what_is_written(tmp_path):
    """Modes are those of the umask."""
    before = os.umask(0o027)
    try:
        checkpoint.save_weights(tmp_path / "w.safetensors", WEIGHTS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o640
