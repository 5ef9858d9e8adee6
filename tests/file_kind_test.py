"""Files are known by their first bytes, whatever their names say."""

import gzip
import io
import tarfile
import zipfile

import imageio.v3 as iio
import numpy as np
import pytest
import safetensors.numpy

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import file_kind

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:78967f\nsize 145875068\n"


def zipped() -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr("a", "b")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


def picture(extension: str, frames: int = 0) -> bytes:
    pixels = np.zeros((*([frames] if frames else []), 16, 16, 3), np.uint8)
    return iio.imwrite("<bytes>", pixels, extension=extension)


FILES = {
    "lfs": [POINTER.encode()],
    "annex": [b"/annex/objects/SHA256E-s5--00.safetensors\n"],
    "empty": [b""],
    "zeros": [bytes(5000)],
    "web page": [b"<!DOCTYPE html>\n<html></html>", b"\n <HTML lang=en>", b"<?xml version='1.0'?>"],
    "zip": [zipped()],
    "compressed": [gzip.compress(b"a"), tarred()],
    "safetensors": [safetensors.numpy.save({"a": np.zeros(3)})],
    "image": [picture(".png"), picture(".jpg")],
    "gif": [picture(".gif")],
    "video": [picture(".mp4", 2)],
    "json": [b'{"error": "not found"}', b"[1, 2]"],
    "text": [b"A cat runs.\n", b"\xef\xbb\xbfA fox.", ("x" * 4095 + "\u00e9").encode()],
    "utf-16": ["A cat runs.".encode("utf-16")],
}
CASES = [(kind, content) for kind, contents in FILES.items() for content in contents]


@pytest.mark.parametrize("kind, content", CASES, ids=[kind for kind, _ in CASES])
def test_a_file_is_known_by_its_first_bytes(tmp_path, kind, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    found = file_kind.kind_of(path)
    assert found is not None and found[0] == kind
    file_kind.check(path, "weights", kind)
    with pytest.raises(UsageError, match=r"weights.pt is not prompts but .* bytes\); "):
        file_kind.check(path, "prompts", "something else")


def test_the_length_of_a_header_is_not_taken_for_a_beginning(tmp_path):
    """A header of 640 bytes begins like a pickle, one of 35,615 like a gzip archive."""
    for length in (640, 896, 1152, 1408, 35_615):
        header = b"{}".ljust(length)
        (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header)
        assert file_kind.kind_of(tmp_path / "w") == ("safetensors", "a safetensors file")


@pytest.mark.parametrize("content", [b"Un caf\xe9.\n", b"A cat\0 runs.\n", bytes(range(9, 90))])
def test_what_resembles_nothing_passes(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert file_kind.describe(path) is None
    file_kind.check(path, "a video", "video")


def test_a_message_says_what_to_do(tmp_path):
    path = tmp_path / "longlive_base.pt"
    path.write_text(POINTER)
    assert file_kind.describe(path) == (
        f"a Git LFS pointer ({len(POINTER)} bytes); `git lfs pull` in its repository gets the file"
        " itself"
    )
    path.write_text("<html>404</html>")
    assert "download it again" in str(file_kind.describe(path))
