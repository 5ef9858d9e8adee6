"""Checksums: the same bytes have the same, on any machine, and other bytes have another."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax.runtime import sums


def test_a_sum_is_the_first_half_of_sha256():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(x.tobytes()).hexdigest()[:32]
    arrays = {"a": jnp.asarray(x), "view": x.T.copy().T, "b": jnp.asarray(2, jnp.bfloat16)}
    found = sums.of_arrays(arrays)
    assert found["a"] == found["view"] == sums.of_bytes(x.tobytes()[:5], x.tobytes()[5:])
    assert found["a"] == expected
    assert found["b"] == hashlib.sha256(b"\x00\x40").hexdigest()[:32]


def test_a_sealed_record_is_opened_after_json_and_not_after_a_change():
    record = {"seconds": 1 / 3, "config": {"steps": (1.0, 0.5), "name": "ü"}}
    read = json.loads(json.dumps(sums.sealed(record)))
    assert sums.opened(read) == {"seconds": 1 / 3, "config": {"steps": [1.0, 0.5], "name": "ü"}}
    for changed in (read | {"seconds": 0.5}, read | {"new": 1}, read | {sums.SEAL: "0"}, {}):
        with pytest.raises(ValueError, match="not what was saved"):
            sums.opened(changed)


def test_a_folder_has_the_names_and_contents_of_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"one")
    first = sums.of_path(tmp_path)
    assert sums.of_path(tmp_path) == first
    (tmp_path / "a" / "x").write_bytes(b"two")
    second = sums.of_path(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, second, sums.of_path(tmp_path)}) == 3


def test_of_a_large_file_the_size_and_both_ends_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "WHOLE", 100)
    monkeypatch.setattr(sums, "END", 10)
    path, content = tmp_path / "w", bytearray(range(200))

    def of(changed):
        path.write_bytes(changed)
        return sums.of_path(path)

    whole = of(content)
    for at, is_seen in ((0, True), (9, True), (10, False), (189, False), (190, True), (199, True)):
        changed = bytearray(content)
        changed[at] ^= 1
        assert (of(changed) != whole) == is_seen
    assert of(content[:50] + content[49:]) != whole
    small = bytearray(100)
    before = of(small)
    small[50] = 1
    assert of(small) != before
