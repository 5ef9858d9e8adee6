"""The memory plan, against sizes that can be worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "plan_memory.py"


def plan(tmp_path, *arguments):
    command = [sys.executable, TOOL, f"--json={tmp_path / 'plan.json'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "plan.json").read_text()), done.stdout


def test_parts_and_programs_of_the_toy(tmp_path):
    """On 4 devices, 2 over prompts and 2 over branches."""
    figures, said = plan(
        tmp_path,
        "--config=configs/tiny.py",
        "--devices=4",
        "--compile",
        "--config.mesh.data=2",
        "--config.mesh.branch=2",
    )
    sizes = {name: round(1e9 * size) for name, size in figures["resident_gb"].items()}
    frame = 2 * 3 * 4 * 96 * 4  # keys and values, layers, tokens, width, bytes
    index = 4  # bytes of a slot's frame number
    assert sizes["base weights"] == 541_488 * 4
    assert sizes["history (shared by the branches)"] == 2 * 36 * (frame + index)  # half of 4 prompts
    # Every shard has half of the branches and its anchor; a page holds the sink and twelve frames.
    assert sizes["pages (one per trajectory)"] == 2 * 5 * 15 * (frame + index)
    # The same 4 branches and the anchor.
    assert sizes["latents of all trajectories"] == 2 * 5 * 36 * 4 * 4 * 12 * 4
    assert sizes["pixels of all trajectories"] == 2 * 5 * 36 * 8 * 8 * 3 * 4
    assert set(figures["program_gb"]) == {
        "block of the prefix (generate)", "block of all branches", "replay forward", "gradient"
    }  # fmt: skip
    assert all(size > 0 for size in figures["program_gb"].values())
    assert "fits into 141 GB" in said


def test_full_size_needs_more_than_a_small_card(tmp_path):
    figures, said = plan(tmp_path, "--memory_gb=24", "--config.train.prompts_per_iteration=8")
    # 33 frames of 1560 tokens, 30 layers, 1536 channels, keys and values in bf16, and their numbers.
    history = 33 * (2 * 30 * 1560 * 1536 * 2 + 4)
    assert round(1e9 * figures["resident_gb"]["history (shared by the branches)"]) == history
    assert figures["resident_gb"]["base weights"] == pytest.approx(2.84, abs=0.01)
    # The published counts of parameters but HPSv3's unused language head, in bf16; norms and heads are in float32.
    vision_norms = 32 * 4 * 1280 + 2 * 1280
    norms = {"hpsv3": vision_norms + (2 * 28 + 1) * 3584, "videoalign": vision_norms + (2 * 28 + 1) * 1536}
    rewards = {
        "reward hpsv3": 2 * (7_744_923_136 + norms["hpsv3"]) + 4 * 3_687_474,
        "reward videoalign": 2 * (2_208_561_664 + norms["videoalign"]) + 4 * 4608,
    }
    assert {name: round(1e9 * figures["resident_gb"][name]) for name in rewards} == rewards
    assert "does not fit into 24 GB; what helps: rollout.branch_chunk" in said
    chunks, _ = plan(tmp_path, "--config.train.prompts_per_iteration=8", "--config.rollout.branch_chunk=2")
    pages = "pages (one per trajectory)"
    assert chunks["resident_gb"][pages] == pytest.approx(figures["resident_gb"][pages] * 3 / 9)
    # Two frames of the input of every temporal convolution, in float32: 1.89 GB in bfloat16 by the release's.
    assert figures["resident_gb"]["VAE: memory of all trajectories"] == pytest.approx(9 * 2 * 1.89, rel=0.02)
    released, said = plan(tmp_path, "--memory_gb=24", "--config.reward.resident=False")
    assert "(without 19.92 of rewards" in said and released["resident_gb"].keys() == figures["resident_gb"].keys()
