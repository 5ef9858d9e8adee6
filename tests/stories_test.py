"""Stories into segments: where a sentence ends, and what belongs to the one before."""

import pytest

from kvpo_jax.data import stories


@pytest.mark.parametrize(
    "story, segments",
    [
        ("A fox runs. It stops. Snow falls.", ["A fox runs", "It stops", "Snow falls"]),
        ("a fox runs. it stops.it looks", ["a fox runs", "it stops.it looks"]),
        ("The fox runs.It stops", ["The fox runs", "It stops"]),
        ("Dr. Smith meets Mrs. J. Doe. They talk.", ["Dr. Smith meets Mrs. J. Doe", "They talk"]),
        ("It is 3.5 metres tall. v1.0 runs.", ["It is 3.5 metres tall", "v1.0 runs"]),
        ("He comes at 5 p.m. and sits. She waits until 6 a.m. Rain falls.",
         ["He comes at 5 p.m. and sits", "She waits until 6 a.m.", "Rain falls"]),
        ("The U.S. Army leaves the U.S. The end.", ["The U.S. Army leaves the U.S.", "The end"]),
        ("Toys, e.g. a car, i.e. red. No. 5 wins.", ["Toys, e.g. a car, i.e. red", "No. 5 wins"]),
        ("He says no. Five leave.", ["He says no", "Five leave"]),
        ("Cats, dogs, etc. play. Cats, dogs, etc. Then rain.",
         ["Cats, dogs, etc. play", "Cats, dogs, etc.", "Then rain"]),
        ('"Stop!" he shouts. "Run!" It runs.', ['"Stop!" he shouts', '"Run!"', "It runs"]),
        ("It waits... and runs. It waits... It runs.",
         ["It waits... and runs", "It waits...", "It runs"]),
        ("Wow! A fox? yes. ", ["Wow!", "A fox?", "yes"]),
        ("1. A fox runs. 2. It stops.", ["1. A fox runs", "2. It stops"]),
        ("狐狸跑。它停下！雪。", ["狐狸跑。", "它停下！", "雪。"]),
        ("...", ["..."]),
        (" . ", []),
        ("A  fox\truns", ["A fox runs"]),
    ],
)  # fmt: skip
def test_a_segment_ends_where_a_sentence_does(story, segments):
    assert list(stories.segments(story)) == segments


def test_an_instruction_to_the_camera_belongs_to_the_scene_before_it():
    assert stories.segments("A fox runs. It stops. Slow zoom in.") == (
        "A fox runs",
        "It stops, Slow zoom in",
    )
    long = "The camera stays far away while the fox is running home"
    assert stories.segments(f"A fox runs. {long}.") == ("A fox runs", long)
    assert stories.segments("Static shot. A fox runs.") == ("Static shot", "A fox runs")
    assert stories.segments("A wide shot.") == ("A wide shot",)
