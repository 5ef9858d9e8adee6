"""Clips, segments and the composite reward: the released arithmetic, and numbers by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from equipment import pixels_of

from kvpo_jax import backbone
from kvpo_jax import run as run_lib
from kvpo_jax.data import return_world, toy_world
from kvpo_jax.errors import NotFiniteError, UsageError
from kvpo_jax.rewards import composite, scorers
from kvpo_jax.rewards.composite import Clip, Clipping
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import Pixels


def clipping(*switch_frames, clip_frames=0):
    """Clips of a video whose latent frames are its pixel frames, as in the toy."""
    return Clipping(switch_frames, clip_frames, to_pixel=int)


@pytest.fixture
def golden(golden_dir):
    return json.loads((golden_dir / "rewards_clips.json").read_text())


def mean_and_length(pixels, prompts):
    """A scorer: the mean of red, and how long the prompt is."""
    return {
        "red": jnp.mean(pixels[..., 0], axis=(1, 2, 3)),
        "length": jnp.asarray([len(p) for p in prompts], float),
    }


def counting_video(p, t, frames):
    """float[P, T, frames, 2, 2, 3]: frame f of trajectory (p, t) has the value 100 p + 10 t + f."""
    value = 100 * np.arange(p)[:, None, None] + 10 * np.arange(t)[None, :, None] + np.arange(frames)
    value = jnp.asarray(value[..., None, None, None], jnp.float32)
    return jnp.broadcast_to(value, (p, t, frames, 2, 2, 3))


# ---------------------------------------------------------------- golden


@pytest.mark.golden
def test_golden_latent_to_pixel(golden):
    for frame, pixel in golden["latent_to_pixel"].items():
        assert composite.latent_to_pixel(int(frame)) == pixel


@pytest.mark.golden
def test_golden_clip_window(golden):
    for case in golden["make_clip_window"]:
        assert composite.clip_window(case["center"], case["total"], case["clip_len"]) == tuple(
            case["out"]
        )


@pytest.mark.golden
def test_golden_clip_specs(golden):
    for case in golden["clip_specs"]:
        clips = composite.segment_clips(
            case["full_pixel_len"],
            case["num_prompts"],
            Clipping(case["switch"], case["clip_len"], composite.latent_to_pixel),
        )
        ours = [
            {
                "name": f"normal_seg_{c.segment}",
                "start": c.start,
                "end": c.end,
                "prompt": f"p{c.segment}",
                "group": "normal",
            }
            for c in clips
        ]
        assert ours == case["specs"] and case["transition"] == []


@pytest.mark.golden
def test_golden_segment_for_frame(golden):
    for case in golden["segment_for_frame"]:
        assert config_lib.segment_of(case["frame"], case["switch"]) == case["seg"]


@pytest.mark.golden
def test_golden_switches_begin_chunks(golden):
    """The release moves a switch to the next start of a chunk; ours are at one already."""
    (case,) = golden["switch_alignment"]
    video = config_lib.load("configs/longlive.py").video
    assert video.blocks * video.block_frames == case["total"]
    assert list(video.switch_frames) == case["switch"]


# ---------------------------------------------------------------- clips


def test_whole_segments_when_clips_have_no_length():
    clips = composite.segment_clips(48, 4, clipping(12, 24, 36))
    assert clips == [Clip(0, 0, 12), Clip(1, 12, 24), Clip(2, 24, 36), Clip(3, 36, 48)]
    # Latent frame 3 is pixel 9: the video ends before the second segment.
    whole = Clipping((3,), 0, composite.latent_to_pixel)
    assert composite.segment_clips(9, 2, whole) == [Clip(0, 0, 9)]


def test_clips_are_centred_in_their_segment():
    clips = composite.segment_clips(48, 2, clipping(12, clip_frames=4))
    assert clips == [Clip(0, 4, 8), Clip(1, 28, 32)]


def test_segments_of_one_frame_are_not_scored():
    assert composite.segment_clips(10, 3, clipping(1, 9)) == [Clip(1, 1, 9)]


def test_a_long_segment_has_a_clip_for_every_so_many_frames():
    """585 frames, about four times 160: clips around 73, 219, 365 and 511."""
    spaced = Clipping((), 36, composite.latent_to_pixel, spacing=160)
    clips = composite.segment_clips(585, 1, spaced)
    assert [(c.segment, c.start, c.end) for c in clips] == [
        (0, 55, 91),
        (0, 201, 237),
        (0, 347, 383),
        (0, 493, 529),
    ]
    # A segment of up to one and a half times as many has one, as have whole segments.
    assert len(composite.segment_clips(239, 1, spaced)) == 1
    assert len(composite.segment_clips(241, 1, spaced)) == 2
    whole = Clipping((), 0, composite.latent_to_pixel, spacing=160)
    assert composite.segment_clips(585, 1, whole) == [Clip(0, 0, 585)]


def test_the_share_of_the_scored_frames_behind_a_fork():
    clips = [Clip(0, 2, 6), Clip(1, 10, 14)]
    shares = [composite.share_behind(clips, frame) for frame in (0, 3, 8, 12, 14)]
    assert shares == [1.0, 7 / 8, 0.5, 0.25, 0.0]


def test_missing_switch_frames_are_an_error():
    with pytest.raises(ValueError, match="4 prompts need 3 switch frames"):
        composite.segment_clips(48, 4, clipping(12, 24))


# ---------------------------------------------------------------- scores


def test_segment_rewards_are_means_over_the_segments():
    prompts = [["a", "bbb"], ["cc", "dddd"]]
    video = counting_video(2, 3, 6)
    clips = composite.segment_clips(6, 2, clipping(2))
    rewards = composite.segment_rewards(mean_and_length, pixels_of(video), prompts, clips)
    # Segments of frames 0-1 (mean 0.5) and 2-5 (mean 3.5): 2 on average, although the second
    # segment has more frames.
    np.testing.assert_allclose(rewards["red"], [[2, 12, 22], [102, 112, 122]], rtol=1e-6)
    np.testing.assert_array_equal(rewards["length"], [[2, 2, 2], [3, 3, 3]])


def test_each_segment_is_one_call_with_its_own_sentences():
    calls = []

    def scorer(pixels, prompts):
        calls.append((pixels.shape, list(prompts), pixels[:, 0, 0, 0, 0].tolist()))
        return {"red": pixels[:, 0, 0, 0, 0]}

    composite.segment_rewards(
        scorer,
        pixels_of(counting_video(2, 2, 13)),
        [["a", "b"], ["c", "d"]],
        composite.segment_clips(13, 2, Clipping((2,), 4, composite.latent_to_pixel)),
    )
    # Latent frame 2 is pixel 5; clips of four frames around pixels 2 and 9.
    assert calls == [
        ((4, 4, 2, 2, 3), ["a", "a", "c", "c"], [0, 10, 100, 110]),
        ((4, 4, 2, 2, 3), ["b", "b", "d", "d"], [7, 17, 107, 117]),
    ]


def test_a_sentence_knows_those_before_it():
    told = []

    def scorer(pixels, prompts):
        told.extend((str(prompt), prompt.before) for prompt in prompts)
        return {"red": pixels[:, 0, 0, 0, 0]}

    clips = [Clip(0, 0, 2), Clip(2, 2, 4)]
    stories = [["a", "b", "c"], ["d", "e", "f"]]
    composite.segment_rewards(scorer, pixels_of(counting_video(2, 1, 4)), stories, clips)
    assert told == [("a", ()), ("d", ()), ("c", ("a", "b")), ("f", ("d", "e"))]
    assert composite.Sentence("a").before == ()


def test_only_the_segments_that_are_named_are_scored():
    config = config_lib.load("configs/return.py")
    # The last of five sentences, under which frames 15 to 23 are made.
    assert backbone.scored_clips(config, lambda frame: frame) == [Clip(4, 15, 24)]
    with config.unlocked():
        config.reward.segments = (0, 4)
    assert [clip.segment for clip in backbone.scored_clips(config, lambda f: f)] == [0, 4]
    with config.unlocked():
        config.reward.segments = (5,)
    with pytest.raises(UsageError, match=r"reward.segments=\(5,\): 5 is no prompt segment.* are 5"):
        backbone.scored_clips(config, lambda frame: frame)


def test_a_score_that_is_not_finite_names_component_prompt_and_trajectory():
    def scorer(pixels, prompts):
        values = pixels[:, 0, 0, 0, 0]
        return {"VQ": values, "MQ": jnp.where(values == 111, jnp.nan, values)}

    video, prompts = counting_video(2, 2, 4) + 1, [["a", "b"], ["c", "d"]]
    with pytest.raises(NotFiniteError, match=r"MQ is nan for prompt 1 \('c'\), trajectory 1 of 2"):
        composite.segment_rewards(scorer, pixels_of(video), prompts, [Clip(0, 0, 2), Clip(1, 2, 4)])


def test_prompt_sequences_of_different_lengths_are_an_error():
    video, prompts = counting_video(2, 1, 4), [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="different lengths"):
        composite.segment_rewards(mean_and_length, pixels_of(video), prompts, [Clip(0, 0, 4)])


def test_video_too_short_to_score_is_an_error():
    with pytest.raises(ValueError, match="no prompt segment of 2 pixel frames has two"):
        composite.segment_clips(2, 2, clipping(1))


@pytest.mark.parametrize(
    "returned, message",
    [
        (None, "reward mine returned nothing, expected a dict {component: 2 numbers}"),
        ({}, "reward mine returned nothing, "),
        (np.zeros(2), r"reward mine returned an array of shape \(2,\), "),
        (
            {"q": 0.5},
            r"reward mine: 'q' has the shape \(\), expected one number for each of 2 clips",
        ),
        ({"q": np.zeros((2, 1))}, r"reward mine: 'q' has the shape \(2, 1\), "),
        ({"q": [0.5]}, r"reward mine: 'q' has the shape \(1,\), "),
        ({"q": [[0.5], [0.5, 1.0]]}, "reward mine: 'q' is no array "),
        ({"q": ["a", "b"]}, "reward mine: 'q' is of type <U1, "),
        ({"q": None}, r"reward mine: 'q' has the shape \(\), "),
        ({"q": [1j, 2j]}, "reward mine: 'q' is of type complex128, "),
        ({"q": torch.ones(2, requires_grad=True)}, "reward mine: 'q' is no array .*detach"),
        ({1: [0.0, 1.0]}, "reward mine: the component 1 is no name"),
    ],
)
def test_what_a_scorer_returns_wrongly_is_named(monkeypatch, returned, message):
    monkeypatch.setitem(scorers.SCORERS, "mine", lambda paths: lambda pixels, prompts: returned)
    with pytest.raises(UsageError, match=message):
        scorers.Scorers("mine", {})(jnp.zeros((2, 1, 8, 8, 3)), ["a", "b"])


@pytest.mark.parametrize(
    "values", [[0.25, 1], (True, False), jnp.ones(2, jnp.bfloat16), torch.ones(2)]
)
def test_a_scorer_may_return_numbers_in_any_form(monkeypatch, values):
    score = {"q": values}
    monkeypatch.setitem(scorers.SCORERS, "mine", lambda paths: lambda pixels, prompts: score)
    scored = scorers.Scorers("mine", {})(jnp.zeros((2, 1, 8, 8, 3)), ["a", "b"])
    np.testing.assert_array_equal(np.asarray(scored["q"], np.float32), np.float32(values))


def test_composite_is_the_weighted_sum():
    components = {
        "VQ": jnp.array([[1.0, 2.0]]),
        "MQ": jnp.array([[10.0, 20.0]]),
        "TA": jnp.array([[5.0, 5.0]]),
    }
    total = composite.composite(components, {"VQ": 2.0, "MQ": 0.5})
    np.testing.assert_array_equal(total, [[7.0, 14.0]])


def test_a_weight_without_a_component_is_an_error():
    components = {"VQ": jnp.ones((1, 1)), "MQ": jnp.ones((1, 1))}
    wrong = "weights.HPS=1: config.reward.scorer has only VQ, MQ; add .*HPS=0"
    with pytest.raises(ValueError, match=wrong):
        composite.composite(components, {"VQ": 1.0, "HPS": 1.0})
    with pytest.raises(ValueError, match="no reward counts: add .* of config.reward.scorer, VQ"):
        composite.composite({"VQ": jnp.ones((1, 1))}, {"MQ": 0.0})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["reward.scorer=toy", "reward.weights.smoothness=1"],
            "weights.smoothness=1: .* has only VQ, MQ, TA;",
        ),
        (
            [f"reward.weights.{name}=0" for name in ("VQ", "MQ", "TA")],
            "no reward counts: .*, VQ or MQ or TA$",
        ),
        (
            ["reward.scorer=toy,motion"],
            "config.eval.scorer has a component 'motion' that config.reward.scorer has too",
        ),
    ],
)
def test_rewards_that_cannot_be_weighed_are_an_error_before_anything_is_generated(
    arguments, message
):
    config = config_lib.load("configs/tiny.py")
    config = config_lib.override(config, [f"--config.{x}" for x in arguments])
    with pytest.raises(ValueError, match=message):
        run_lib.load(config)


def test_components_are_those_that_the_scorers_give():
    """Without weights; those of hpsv3 and videoalign are in rewards_learned_test.py."""
    for name, sentence, side in (
        ("motion", "a", 8),
        ("toy", "a red disk moves left", toy_world.SIZE),
        ("return", "a red dot", return_world.SIZE),
    ):
        given = scorers.Scorers(name, {})(jnp.ones((1, 4, side, side, 3)), [sentence])
        assert given.keys() == set(scorers.components_of(name))
    assert scorers.components_of("toy, motion") == ["VQ", "MQ", "TA", "motion", "smoothness"]
    assert scorers.components_of("") == [] and scorers.components_of("toy,mine:score") is None


def test_a_rollout_separates_branches_and_anchor():
    pixels = counting_video(2, 4, 6)
    scores = composite.ask_rollout(
        mean_and_length,
        pixels_of(pixels[:, :3], pixels[:, 3]),
        [["a", "b"], ["cc", "dd"]],
        {"red": 1.0, "length": 10.0},
        composite.segment_clips(6, 2, clipping(2)),
    )()
    np.testing.assert_allclose(scores.branches, [[12, 22, 32], [122, 132, 142]], rtol=1e-6)
    np.testing.assert_allclose(scores.anchor, [42, 152], rtol=1e-6)
    branches, anchor = scores.components["length"]
    np.testing.assert_array_equal(branches, [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(anchor, [1, 2])


def test_only_the_frames_of_a_clip_are_copied():
    """Pixels of a group are gigabytes at full size. While a clip of 3 of 40 frames is scored, no
    array joins more than these frames of branches and anchor.
    """
    joined = []

    def scorer(pixels, prompts):
        joined.extend(x.shape[2] for x in jax.live_arrays() if x.ndim == 6 and x.shape[1] == 4)
        return mean_and_length(pixels, prompts)

    pixels = np.array(counting_video(1, 4, 40))  # a copy: the array on the device is freed
    group = pixels_of(jnp.asarray(pixels[:, :3]), jnp.asarray(pixels[:, 3]))
    clips = composite.segment_clips(40, 2, clipping(20, clip_frames=3))
    scores = composite.ask_rollout(scorer, group, [["a", "b"]], {"red": 1.0}, clips)()
    composite.ask_window(scorer, group, ["a"], {"red": 1.0}, (9, 12))()
    assert set(joined) == {3}
    # The middle frames of both halves are 10 and 30.
    np.testing.assert_allclose(scores.branches, [[20, 30, 40]], rtol=1e-6)
    np.testing.assert_allclose(scores.anchor, [50], rtol=1e-6)


def test_a_function_gets_floats_of_stored_pixels(monkeypatch):
    given = []
    monkeypatch.setitem(
        scorers.SCORERS, "mine", lambda paths: lambda pixels, _: given.append(pixels) or {"x": [1]}
    )
    stored = jnp.arange(192, dtype=jnp.uint8).reshape(1, 1, 8, 8, 3)
    scorers.Scorers("mine", {})(stored, ["a"])
    np.testing.assert_allclose(given[0].reshape(-1), np.arange(192) / 255, rtol=1e-6)
    assert given[0].dtype == jnp.float32


def test_a_window_is_the_local_signal_of_the_fork_segment():
    pixels, prompts, switches = counting_video(1, 3, 10), [["a", "bb", "ccc"]], (4, 8)
    segment = config_lib.segment_of(5, switches)
    scores = composite.ask_window(
        mean_and_length,
        pixels_of(pixels[:, :2], pixels[:, 2]),
        [p[segment] for p in prompts],
        {"red": 1.0, "length": 1.0},
        (3, 6),
    )()
    np.testing.assert_allclose(scores.branches, [[4 + 2, 14 + 2]], rtol=1e-6)
    np.testing.assert_allclose(scores.anchor, [24 + 2], rtol=1e-6)


@pytest.mark.parametrize("window", [(3, 3), (-1, 2)])
def test_a_local_window_without_frames_is_an_error(window):
    group = pixels_of(counting_video(1, 2, 10), counting_video(1, 1, 10)[:, 0])
    with pytest.raises(ValueError, match="local window"):
        composite.ask_window(mean_and_length, group, ["a"], {"red": 1.0}, window)()


# ---------------------------------------------------------------- what is shared is scored once


def forked(branches, frames, fork):
    """Two groups of red disks that jump about in their own ways from frame `fork` on."""
    rng = np.random.default_rng(fork)
    centers = rng.uniform(0, 8, (2, branches + 1, frames, 2)).astype(np.float32)
    centers[:, :, :fork] = centers[:, :1, :fork]
    videos = toy_world.render(jnp.asarray(centers), 0, 0)
    return pixels_of(videos[:, 1:], videos[:, 0], fork)


@pytest.mark.parametrize("fork", [3, 4, 6, 9, 12])
@pytest.mark.parametrize("name", ["toy", "motion"])
def test_the_rewards_of_a_fork_are_those_of_all_its_videos(name, fork):
    """Of clips of frames 0-3, 4-7 and 8-11 those that end before the fork are scored once."""
    sentences = [["a red disk moves left"] * 3, ["a blue square moves up"] * 3]
    clips = composite.segment_clips(12, 3, clipping(4, 8))
    weights, scored = {{"toy": "TA", "motion": "motion"}[name]: 1.0}, []
    load = scorers.Scorers(name, {})

    def scorer(pixels, prompts, shared=None):
        scored.append(len(pixels))
        return load(pixels, prompts, shared)

    group = forked(3, 12, fork)
    ours = composite.ask_rollout(scorer, group, sentences, weights, clips)()
    assert scored == [2 if end <= fork else 2 * 4 for end in (4, 8, 12)]
    theirs = composite.ask_rollout(load, group.replace(fork=0), sentences, weights, clips)()
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=0), ours, theirs)
    assert np.ptp(ours.branches, axis=1).min() > 1e-3 or fork == 12


def test_only_frames_that_were_decoded_are_scored():
    video = counting_video(1, 1, 10)[:, :, [2, 3, 7, 8, 9]]
    pixels = Pixels(video, None, ((2, 4), (7, 10)))
    rewards = composite.segment_rewards(mean_and_length, pixels, [["a"]], [Clip(0, 7, 10)])
    assert rewards["red"] == 8
    with pytest.raises(ValueError, match="frames 3 to 7 are read, but were not decoded"):
        composite.segment_rewards(mean_and_length, pixels, [["a"]], [Clip(0, 3, 8)])
