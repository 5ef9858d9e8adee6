"""Pictures of videos: strips of frames, before and after."""

import io

import numpy as np
from PIL import Image

from kvpo_jax.runtime import pictures


def test_strips_show_pixels_as_squares():
    rng = np.random.default_rng(0)
    clips = rng.random((2, 3, 12, 12, 3)).astype(np.float32)
    sheet = np.asarray(pictures.sheet([("anchor", clips[0]), ("branch 0", clips[1])], np.arange(3)))
    right = 12  # the margin; tiles of 48 pixels, 4 to a pixel of the clip, end there
    tile = sheet[26 : 26 + 48, -right - 1 - 48 : -right - 1]
    np.testing.assert_array_equal(tile[::4, ::4], np.round(255 * clips[0, 2]).astype(np.uint8))
    np.testing.assert_array_equal(tile[::4], tile[3::4])


def test_before_after_has_two_strips_per_prompt(tmp_path):
    prompts = [["a red disk moves left", "a blue disk moves left"]] * 3
    frames = pictures.before_after_frames(48, 12, 12, (24,))
    shape = (3, len(frames), 12, 12, 3)
    path = tmp_path / "report" / "before_after.png"
    drawn = pictures.before_after(
        prompts,
        (24,),
        frames,
        {"before": np.zeros(shape), "after": np.ones(shape)},
        {"before": np.zeros(3), "after": np.asarray([1, -1, 0])},
    )
    pictures.save(drawn, path)
    picture = np.asarray(Image.open(path)).astype(int)
    black_rows = np.sum(np.all(picture == 0, axis=-1), axis=1) == 24 * 48
    assert np.sum(black_rows) == 3 * 48


def test_every_segment_is_shown_however_short():
    frames = pictures.before_after_frames(48, 12, 12, (1, 3))
    clips = np.zeros((1, len(frames), 12, 12, 3))
    drawn = pictures.before_after(
        [["one", "two", "three"]],
        (1, 3),
        frames,
        {"before": clips, "after": clips},
        {"before": np.zeros(1), "after": np.zeros(1)},
    )
    black = np.all(np.asarray(drawn) == 0, axis=-1)
    assert (
        np.max(np.sum(black, axis=1)) == (24 + 2) * 48
    )  # frames 1 and 3 are shown besides 24 even ones


def test_a_gallery_has_every_video_below_its_caption():
    """Frame f of video v is of one grey, 20 v + f; a tile has 96 pixels."""
    videos = np.zeros((9, 4, 12, 12, 3), np.uint8)
    videos += 1 + (20 * np.arange(9)[:, None] + np.arange(4))[:, :, None, None, None].astype(
        np.uint8
    )
    drawn = pictures.gallery([f"branch {v}  0.1234" for v in range(9)], videos)
    assert drawn.dtype == np.uint8 and len(drawn) == 4
    for frame in range(4):
        for v in range(9):
            found = np.all(drawn[frame] == 1 + 20 * v + frame, axis=-1)
            across, down = np.sum(found, axis=1) >= 96, np.sum(found, axis=0) >= 96
            assert (across.sum(), down.sum()) == (96, 96) and found[across][:, down].all()
    assert np.any(drawn[0, :16] != 255)  # the captions
    np.testing.assert_array_equal(drawn[0, :16], drawn[3, :16])


def test_a_gif_moves():
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    frames += np.array([0, 120, 250], np.uint8)[:, None, None, None]
    with Image.open(io.BytesIO(pictures.gif(frames, 8))) as image:
        assert image.n_frames == 3 and image.info["duration"] == 120  # in steps of 10 ms
        for number, frame in enumerate(frames):
            image.seek(number)
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - frame).max() <= 8


def test_a_moving_picture_has_every_frame_of_every_video(tmp_path):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 255, (2, 2, 5))  # of a policy, a prompt and a frame
    clips = np.broadcast_to(levels[..., None, None, None], (2, 2, 5, 8, 8, 3)).astype(np.uint8)
    rewards = {"before": np.zeros(2), "after": np.ones(2)}
    prompts = [["one", "two " * 90], ["three", "four"]]
    path = tmp_path / "new" / "moving.gif"
    videos = {"before": clips[0], "after": clips[1]}
    pictures.moving(prompts, (3,), videos, rewards, 8, path)
    with Image.open(path) as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        shown = []
        for frame in range(5):
            gif.seek(frame)
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
    # The middles of the videos: rows are policies, columns prompts.
    height, width, _ = shown[0].shape
    rows, columns = (46 + 84, height - 34 - 84), (width - 184 - 16 - 84, width - 16 - 84)
    found = [[[x[row, column, 0] for x in shown] for column in columns] for row in rows]
    np.testing.assert_allclose(found, levels, atol=2)  # of 255; a GIF has a palette
    text = [x[:46] for x in shown]
    assert np.array_equal(text[0], text[2]) and np.array_equal(text[3], text[4])
    assert not np.array_equal(text[2], text[3])


def test_long_prompts_are_cut_to_two_lines():
    font = pictures._font(13)
    assert pictures._wrap("a red disk moves left", font, 400) == ["a red disk moves left"]
    lines = pictures._wrap("word " * 100, font, 120)
    assert (
        len(lines) == 2
        and lines[1].endswith("...")
        and all(font.getlength(line) <= 120 for line in lines)
    )
