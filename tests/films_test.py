"""The videos of a run directory: names, what a continued run leaves, a full disk, a browser."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from kvpo_jax.runtime import films, video
from kvpo_jax.runtime.films import Film

NAMES = {
    Film("iteration", 20, 0, "anchor"): "videos/iteration_00020/prompt_0_anchor.mp4",
    Film("iteration", 20, 0, "branch_3"): "videos/iteration_00020/prompt_0_branch_3.mp4",
    Film("iteration", 20, 0, "branch_10"): "videos/iteration_00020/prompt_0_branch_10.mp4",
    Film("heldout", 0, 0, "reference"): "videos/heldout_00000/000_reference.mp4",
    Film("heldout", 123456, 31, "online"): "videos/heldout_123456/031_online.mp4",
}


def put(workdir, *names):
    for name in names:
        path = workdir / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_in(workdir):
    found = (workdir / "videos").glob("*/*")
    return sorted(str(path.relative_to(workdir / "videos")) for path in found)


def noise(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def test_a_name_says_what_a_video_shows():
    for film, name in NAMES.items():
        assert str(film.path) == name and films.film_of(Path("a/run", name)) == film
    for other in (
        "iteration_00020/prompt_0_branch_3.mp4.part",
        "iteration_00020/prompt_0_online.mp4",
        "elsewhere/000_online.mp4",
        "heldout_x/000_online.mp4",
    ):
        assert films.film_of(Path("videos", other)) is None
    assert films.branch_names(2) == ["anchor", "branch_0", "branch_1"]


def test_videos_are_found_in_their_order(tmp_path):
    put(tmp_path, *(Path(name).relative_to("videos") for name in reversed(NAMES.values())))
    put(tmp_path, "iteration_00020/prompt_0_branch_4.mp4.part", "notes/read.me")
    heldout = [film for film in NAMES if film.kind == "heldout"]
    expected = [*heldout, *(film for film in NAMES if film.kind == "iteration")]
    assert films.films_in(tmp_path) == {film: tmp_path / NAMES[film] for film in expected}
    assert list(films.films_in(tmp_path)) == expected
    assert films.films_in(tmp_path / "none") == {}


def test_a_continued_run_leaves_whole_videos_of_what_is_not_made_again(tmp_path):
    """It goes on with iteration 20, after the evaluation of the 20 before."""
    kept = [
        "heldout_00000/000_reference.mp4",
        "heldout_00020/000_online.mp4",
        "iteration_00019/prompt_0_anchor.mp4",
        "mine/a.mp4",
    ]
    again = [
        "heldout_00000/001_reference.mp4.part",
        "heldout_00021/000_online.mp4",
        "iteration_00019/prompt_0_branch_0.mp4.part",
        "iteration_00020/prompt_0_anchor.mp4",
        "iteration_100000/prompt_0_anchor.mp4",
    ]
    put(tmp_path, *kept, *again)
    films.cut(tmp_path, iterations=20, evaluations=21)
    assert names_in(tmp_path) == kept
    films.cut(tmp_path / "none", iterations=0, evaluations=1)


def test_a_video_is_written_soon(tmp_path):
    writer = films.FilmWriter(tmp_path, fps=8)
    pixels = noise(5, 8, 8)
    for film in NAMES:
        writer.write(film, pixels)
    writer.flush()
    assert list(films.films_in(tmp_path).values())  # before anything is closed
    for film in NAMES:
        assert video.read(tmp_path / film.path).shape == (5, 128, 128, 3)
    writer.close()


# An ffmpeg that meets a full disk, as the system calls it, instead of a signal.
FFMPEG = "#!/bin/sh\ntrap '' XFSZ\nexec {program} \"$@\"\n"
FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import films
writer = films.FilmWriter(Path(sys.argv[1]), fps=8)
noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), np.uint8)
writer.write(films.Film("iteration", 0, 0, "anchor"), noise[:1])
writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # the disk is full
try:
    for i in range(30):
        writer.write(films.Film("iteration", 1, 0, f"branch_{i}"), noise)
    writer.close()
except UsageError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_in_one_line_that_names_the_video(tmp_path):
    program = tmp_path / "ffmpeg"
    program.write_text(FFMPEG.format(program=video.ffmpeg()))
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path],
        env={**os.environ, "IMAGEIO_FFMPEG_EXE": str(program)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "videos" / "iteration_00001" / "prompt_0_branch_0.mp4"
    assert done.stdout == f"{path} cannot be written: File too large\n"
    whole = films.films_in(tmp_path)
    assert list(whole) == [Film("iteration", 0, 0, "anchor")]


PAGE = """<video src="{name}" preload="auto"></video><p id="said"></p><script>
const video = document.querySelector("video");
video.onerror = () => said.textContent = video.error.message;
video.onloadeddata = () => said.textContent = `${{video.videoWidth}} x ${{video.videoHeight}}`;
</script>"""


def test_a_browser_shows_it(browser, tmp_path):
    """Frames of odd sizes, which H.264 has not. The page is loaded once the first is decoded."""
    film = Film("heldout", 0, 0, "online")
    writer = films.FilmWriter(tmp_path, fps=8)
    writer.write(film, noise(4, 131, 133))
    writer.close()
    page = tmp_path / "page.html"
    page.write_text(PAGE.format(name=film.path))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert '<p id="said">134 x 132</p>' in done.stdout
