"""The world "return": its stories, the votes that decide what returns, and its pictures."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import configure

from kvpo_jax import backbone as backbone_lib
from kvpo_jax.algorithm import routing
from kvpo_jax.data import return_world as world
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib

CONFIG = config_lib.load("configs/return.py")
SWITCHES, F = CONFIG.video.switch_frames, CONFIG.video.block_frames
WINDOW = routing.window(CONFIG.window)
RETURN = 15  # the first frame that returns
A, B, C = (world.OBJECTS.index(name) for name in ("a red bar", "a blue dot", "a green pole"))
OUTVOTED, AMBIGUOUS, SINK_WINS = (world.tell(cast) for cast in ((A, B, B), (A, B, C), (A, A, B)))


# ---------------------------------------------------------------- stories


def test_a_story_is_what_a_person_reads():
    assert OUTVOTED == ["a red bar", "a blue dot", "a blue dot", "nothing", "it returns"]
    assert world.tell((A, B, B), world.FIRST_RETURNS)[-1] == "the first returns"
    assert len(set(world.OBJECTS)) == 18
    for o, name in enumerate(world.OBJECTS):
        assert world.parse(name) == o
    assert [world.parse(s) for s in ("nothing", "it returns", "the first returns")] == [-1, -2, -3]


def test_tasks_are_told_apart():
    assert [world.task_of(s) for s in (OUTVOTED, AMBIGUOUS, SINK_WINS)] == list(world.TASKS)
    assert world.task_of([*OUTVOTED[:4], world.FIRST_RETURNS]) == "outvoted"
    others = (
        world.tell((A, A, A)),
        world.tell((A, B, A)),
        ["a red bar", "nothing", "nothing", "nothing", "it returns"],
        ["a red bar", "a blue dot", "a blue dot", "a green pole", "it returns"],
        ["a red disk drifts left", "a blue disk drifts up", "a blue disk drifts up"],
        [],
    )
    assert {world.task_of(story) for story in others} == {"other"}


def test_values_are_grouped_by_task():
    stories = [OUTVOTED, SINK_WINS, OUTVOTED, world.tell((A, A, A))]
    of_policy = {"reward": [1.0, 2.0, 3.0, 4.0], "SC": np.arange(8).reshape(4, 2)}
    found = world.by_task(stories, {"reference": of_policy, "online": of_policy})
    assert list(found) == ["outvoted", "sink wins", "other"]  # nothing is ambiguous here
    for task, rows in (("outvoted", [0, 2]), ("sink wins", [1]), ("other", [3])):
        # The first policy is what the others are compared with, and the reward comes first.
        assert [*found[task]] == ["reference", "online"]
        assert [*found[task]["online"]] == ["reward", "SC"]
        assert found[task]["online"]["reward"].tolist() == [i + 1 for i in rows]
        np.testing.assert_array_equal(found[task]["online"]["SC"], of_policy["SC"][rows])
    with pytest.raises(AssertionError):
        world.by_task(stories[:2], of_policy)


@pytest.mark.parametrize("prompt", ["a purple bar", "a red", "it returns first", "", "red bar"])
def test_an_unknown_sentence_is_an_error_that_quotes_it(prompt):
    for read in (world.parse, lambda p: world.check([p]), lambda p: world.embed([p])):
        with pytest.raises(UsageError, match="the world has 'a COLOUR SHAPE'") as error:
            read(prompt)
        assert repr(prompt) in str(error.value)


def test_embedding_is_one_token_per_word():
    tokens = world.embed(["a red bar", "nothing", "the first returns"])
    assert (
        tokens.shape == (3, 3, 16) and (tokens.sum(axis=-1) == [[1] * 3, [1, 0, 0], [1] * 3]).all()
    )
    assert [world.VOCABULARY[i] for i in tokens[2].argmax(axis=-1)] == ["the", "first", "returns"]
    assert len({world.embed([s]).tobytes() for s in world.SAID}) == len(world.SAID)


def test_training_and_held_out_pairs_are_apart():
    train, heldout = (set(world.PAIRS[split]) for split in ("train", "heldout"))
    # 18 objects, each with the 15 of other colours.
    assert not train & heldout and len(train) + len(heldout) == 18 * 15
    assert {first for first, _ in heldout} == {first for first, _ in train} == set(range(18))
    assert 0.2 < len(heldout) / (18 * 15) < 0.3


def test_training_stories_mix_the_tasks():
    stories = [world.sample_prompts((0, i), "train", 5) for i in range(400)]
    assert world.sample_prompts((0, 7), "train", 5) == stories[7] != stories[8]
    share = Counter(world.task_of(story) for story in stories)
    assert abs(share["outvoted"] - 200) < 50 and abs(share["ambiguous"] - 100) < 45
    assert set(share) == set(world.TASKS)
    for story in stories:
        cast = [world.parse(s) for s in dict.fromkeys(story[:3])]
        assert tuple(cast[:2]) in world.PAIRS["train"] and story[3:] == ["nothing", "it returns"]
        assert len({o // 3 for o in cast}) == len(cast)  # all of different colours


def test_a_run_may_train_on_some_tasks_alone():
    given = {"train.tasks": "('outvoted',)", "eval.prompts": 8}
    backbone = backbone_lib.load(configure("configs/return.py", given))
    tasks = {world.task_of(backbone.prompts("train", i)) for i in range(20)}
    held_out = {world.task_of(backbone.prompts("heldout", i)) for i in range(8)}
    assert tasks == {"outvoted"} and held_out == set(world.TASKS)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("configs/return.py", "have outvoted, ambiguous, sink wins, not 'outvotd'; did you mean"),
        ("configs/tiny.py", "the backbone 'toy' have no tasks"),
        ("configs/longlive.py", "the backbone 'longlive' have no tasks"),
    ],
)
def test_tasks_that_are_none_are_an_error(spec, message):
    with pytest.raises(UsageError, match=message):
        backbone_lib.load(configure(spec, {"train.tasks": "('outvotd',)"}))


def test_held_out_stories_are_different_and_in_turn():
    stories = world.heldout_prompts(132, 5)
    assert len(set(map(tuple, stories))) == 132 and stories[:32] == world.heldout_prompts(32, 5)
    for i, story in enumerate(stories):
        assert world.task_of(story) == world.MIX[i % 4]
        cast = [world.parse(s) for s in dict.fromkeys(story[:3])]
        assert tuple(cast[:2]) in world.PAIRS["heldout"]
    with pytest.raises(UsageError, match="132 held-out stories.*not for 133"):
        world.heldout_prompts(133, 5)


def test_a_story_has_five_sentences():
    for make in (lambda: world.sample_prompts(0, "train", 3), lambda: world.heldout_prompts(2, 3)):
        with pytest.raises(UsageError, match="5 sentences, config.video.switch_frames makes 3"):
            make()


def test_a_quarter_of_the_pretraining_videos_has_the_other_ending():
    rng = np.random.default_rng(0)
    stories = [world.pretraining_prompts(rng) for _ in range(800)]
    assert abs(np.mean([s[-1] == "the first returns" for s in stories]) - 0.25) < 0.06
    assert abs(np.mean([s[1] == s[0] for s in stories]) - 0.25) < 0.06


# ---------------------------------------------------------------- the rule


def deployed(start):
    return routing.deployment_frames(WINDOW, start)


def votes_of(story, context):
    """How many frames of a context show A and B, of a story whose blocks are as they are told."""
    blocks = [world.parse(sentence) for sentence in (story[0], *story[:4])]
    shown = np.repeat(blocks, F)
    attended = shown[np.asarray(context)[np.asarray(context) >= 0]]
    return int((attended == A).sum()), int((attended == B).sum())


def test_the_rule_by_hand():
    """0, 1, 2, 3 of the six routed frames show the first object, beside three of the sink."""
    for routed, share in ((0, 0.015), (1, 0.208), (2, 0.792), (3, 0.985)):
        votes = jnp.array([3 + routed, 6 - routed, 0])
        assert world.vote_probabilities(votes, 6.0)[0] == pytest.approx(share, abs=5e-4)
    np.testing.assert_allclose(world.vote_probabilities(jnp.array([3, 6]), 1.0), [1 / 3, 2 / 3])


def test_what_the_deployment_window_says_of_each_task():
    # The sink (frames 0 to 2) and the last nine frames, of which the empty block votes for nobody.
    assert votes_of(OUTVOTED, deployed(RETURN)) == (3, 6)
    assert votes_of(AMBIGUOUS, deployed(RETURN)) == (3, 3)
    assert votes_of(SINK_WINS, deployed(RETURN)) == (6, 3)


def test_routing_changes_the_votes():
    routed = jnp.array([3, 4, 5, 6, 7, 8])
    context = routing.routed_context(WINDOW, routed, jnp.asarray(RETURN))
    assert votes_of(OUTVOTED, context) == (6, 3)


@pytest.mark.parametrize("exponent", world.EXPONENTS.values())
@pytest.mark.parametrize("routed", range(4))
def test_blocks_follow_the_votes_of_what_they_attend_to(routed, exponent):
    pool = [3, 4, 5, 6, 7, 8, 9, 10, 11]
    frames = jnp.array([*pool[:routed], *pool[3 : 9 - routed]])
    here = routing.routed_context(WINDOW, frames, jnp.asarray(RETURN))
    contexts = jnp.stack([*(deployed(F * b) for b in range(5)), here, deployed(18), deployed(21)])
    said = jnp.array([world.parse(sentence) for sentence in OUTVOTED])

    def sample(key):
        return world.sample_objects(key, said, contexts, F, SWITCHES, exponent)

    shown = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_array_equal(shown[0, :RETURN], np.repeat([A, A, B, B, -1], F))
    returned = shown[:, RETURN]
    assert (
        set(np.unique(returned)) <= {A, B} and (shown[:, RETURN : RETURN + F].T == returned).all()
    )
    expected = world.vote_probabilities(jnp.array([3 + routed, 6 - routed]), exponent)[0]
    assert np.mean(returned == A) == pytest.approx(float(expected), abs=0.05)


def test_the_first_returns_whatever_the_votes_are():
    contexts = jnp.stack([deployed(F * b) for b in range(8)])
    said = jnp.array([world.parse(s) for s in world.tell((A, B, B), world.FIRST_RETURNS)])
    for seed in range(5):
        key = jax.random.key(seed)
        shown = world.sample_objects(key, said, contexts, F, SWITCHES, 6.0)
        assert (shown[RETURN:] == A).all()


# ---------------------------------------------------------------- pictures


def test_a_bar_is_wide_and_a_pole_is_tall():
    center = jnp.full((3, 2), 1.5)
    objects = jnp.array([world.OBJECTS.index(f"a red {shape}") for shape in world.SHAPES])
    dot, bar, pole = np.asarray(world.decode(world.render(center, objects)))[..., 0] - 0.5
    middle, edge = 24, 44
    for picture in (dot, bar, pole):
        assert picture[middle, middle] > 0.25
    assert bar[middle, edge] > 0.15 > 0.1 > dot[middle, edge] and bar[edge, middle] < 0.03
    np.testing.assert_allclose(pole, bar.T, atol=1e-6)
    np.testing.assert_allclose(dot, dot.T, atol=1e-6)


def test_nothing_is_grey():
    empty = world.render(jnp.full((1, 2), 1.5), jnp.array([world.NOTHING]))
    np.testing.assert_allclose(world.decode(empty), world.BACKGROUND, atol=1e-6)


def test_encode_undoes_decode():
    latents = jax.random.uniform(jax.random.key(0), (2, 5, 4, 4, 3), minval=-3.5, maxval=3.5)
    pixels = world.decode(latents)
    assert pixels.shape == (2, 5, 48, 48, 3)
    # A pixel is a mixture of latent pixels, so that nothing here was clipped.
    assert 0 < pixels.min() and pixels.max() < 1
    np.testing.assert_allclose(world.encode(pixels), latents, atol=1e-4)
    assert world.decode(100 * latents).min() == 0 and world.decode(100 * latents).max() == 1


def test_a_block_has_an_appearance_of_its_own():
    objects = jnp.repeat(jnp.array([A, B, -1]), F)
    one, other = (world.sample_latents(jax.random.key(seed), objects, F) for seed in (0, 1))
    assert one.shape == (9, 4, 4, 3) and not np.allclose(one, other)
    np.testing.assert_array_equal(one, world.sample_latents(jax.random.key(0), objects, F))
    # What is empty is speckle, and latents have about unit size.
    assert jnp.std(one[6:]) == pytest.approx(world.SPECKLE / world.LATENT_SCALE, rel=0.2)
    assert 0.5 < jnp.std(one[:6]) < 1.5
