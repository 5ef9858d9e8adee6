"""What routing and noise change in the generators of "return" that ship."""

import branch_diversity
import numpy as np
import pytest
from equipment import configure
from PIL import Image

from kvpo_jax.data import return_world


def test_variance_between_objects_by_hand():
    # Two branches show object 0 at 0 and 2, two show object 1 at 10 and 12.
    pixels = np.array([[[0.0], [2.0], [10.0], [12.0]]])
    variance, between = branch_diversity.between_share(pixels, np.array([[0, 0, 1, 1]]))
    assert variance == 26 and between == pytest.approx(25 / 26)
    _, alone = branch_diversity.between_share(pixels, np.array([[3, 3, 3, 3]]))
    assert alone == 0


def test_stories_of_a_task_do_not_depend_on_how_many_are_asked_for():
    stories = branch_diversity.stories_of("ambiguous", 6, 0)
    assert {return_world.task_of(story) for story in stories} == {"ambiguous"}
    assert branch_diversity.stories_of("ambiguous", 2, 4) == stories[4:]


def test_routing_changes_what_returns_and_noise_how_it_looks(tmp_path):
    drawn = tmp_path / "branches.png"
    config = configure("configs/return.py", {"train.prompts_per_iteration": 8, "eval.prompts": 16})
    runs = branch_diversity.loaded(config, ("routing", "init_noise"))
    measured = branch_diversity.measure(runs, 8, drawn)
    # The anchor and two groups of 8, the frames side by side.
    width, height = Image.open(drawn).size
    assert width > 24 * 48 and height > 17 * 48
    held_out = {(row["task"], row["ending"]): row for row in measured["deployment"]}
    outvoted = held_out["outvoted", "it returns"]
    assert outvoted["shown"] > 0.8 and held_out["sink wins", "it returns"]["wanted"] > 0.9
    # The other ending, of which no run has a prompt, brings the first object back.
    assert held_out["outvoted", "the first returns"]["wanted"] > outvoted["wanted"] + 0.3
    votes = [row["share"] for row in measured["votes"]]
    assert len(votes) == 4 and votes[0] < 0.3 and votes[2] > 0.6 and votes[3] > 0.8
    rows = {(row["task"], row["explore"]): row for row in measured["diversity"]}
    routed, noise = rows["outvoted", "routing"], rows["outvoted", "init_noise"]
    assert routed["wanted"] > 0.5 > 0.3 > noise["wanted"]
    assert routed["between objects"] > noise["between objects"] + 0.1
    assert routed["VQ std"] < noise["VQ std"] and routed["best - anchor"] > noise["best - anchor"]
