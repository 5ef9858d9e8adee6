"""HPSv3 and VideoAlign from tiny random checkpoints in the formats of their upstreams, written by
torch and peft and converted by the real converter, against torch: transformers' Qwen2-VL with 1-D
positions, Pillow, and torch's heads.
"""

import dataclasses
import gc
import json
import weakref
import zipfile
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from convert_weights_test import convert, tensors_of
from equipment import pixels_of
from PIL import Image
from qwen2_vl_test import hf_config
from tokenizers.pre_tokenizers import ByteLevel

from kvpo_jax.convert import templates
from kvpo_jax.convert.convert_weights import copy_tokenizer
from kvpo_jax.convert.mapping import KINDS
from kvpo_jax.convert.reward_lora import lora_scale
from kvpo_jax.convert.reward_weights import reward_table
from kvpo_jax.models import qwen2_vl, reward_model
from kvpo_jax.models.layers import config_from_dict
from kvpo_jax.models.qwen2_vl import Qwen2VLConfig, TextConfig, VisionConfig
from kvpo_jax.models.reward_model import (
    HPSV3_TOKENS,
    VIDEOALIGN_TOKENS,
    RewardConfig,
    VideoAlignConfig,
)
from kvpo_jax.rewards import composite, hpsv3, learned, preprocess, scorers, videoalign

CHAT_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
BASE_TOKENS = 257 + len(CHAT_TOKENS)  # bytes, <|endoftext|> and these
IMAGE_PAD, VIDEO_PAD = BASE_TOKENS - 2, BASE_TOKENS - 1
PROMPTS = ["a {red} disk rolls to the left", "snow, falling: 雪"]
RANK, ALPHA = 4, 8

# Made up, with what the published files have around theirs. Neither is run: both would fail.
HPSV3_PY = '''
import no_such_module
INSTRUCTION = """
Say how much people like this picture.
It was asked for as - {text_prompt}
"""
INSTRUCTION_debug = "{text_prompt}"
prompt_with_special_token = """
In {all}: <|Reward|>

END
"""
raise RuntimeError
'''
HPSV3_TEXT = (
    "\nSay how much people like this picture.\nIt was asked for as - {}\n\nIn {{all}}:"
    " <|Reward|>\n\nEND\n"
)
VIDEOALIGN_PY = '''
OTHER = f"{1 / 0}"
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
Pixels: <|VQ_reward|>
END
Motion: <|MQ_reward|>
END
Textual prompt - {text_prompt}
Text: <|TA_reward|>
END
"""
'''
VIDEOALIGN_TEXT = (
    "\nPixels: <|VQ_reward|>\nEND\nMotion: <|MQ_reward|>\nEND\nTextual prompt - {}\nText:"
    " <|TA_reward|>\nEND\n"
)
MODEL_CONFIG = {
    "data_config": {
        "meta_data": "",
        "max_frame_pixels": 448 * 448,
        "num_frames": None,
        "fps": 2.0,
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
    },
    "model_config": {"output_dim": 3, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {
        "lora_enable": True,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "use_rslora": False,
    },
    "inference_config": {
        "VQ_mean": 3.5,
        "VQ_std": 2.25,
        "MQ_mean": 1.25,
        "MQ_std": 1.5,
        "TA_mean": -2.75,
        "TA_std": 0.5,
    },
}


def tiny(reward_tokens):
    return Qwen2VLConfig(
        TextConfig(
            vocab=BASE_TOKENS + reward_tokens, dim=64, heads=4, kv_heads=2, ffn_dim=96, layers=2
        ),
        VisionConfig(dim=32, ffn_dim=128, heads=2, layers=2),
        image_token=IMAGE_PAD,
        video_token=VIDEO_PAD,
        dtype="float32",
    )


# ---------------------------------------------------------------- checkpoints


def random_model(reward_tokens, seed, head):
    """transformers' tiny model with a head and every parameter drawn anew, scales of norms around
    1.
    """
    torch.manual_seed(seed)
    model = transformers.Qwen2VLForConditionalGeneration(hf_config(tiny(reward_tokens)))
    model.rm_head = head
    model.eval()
    for name, parameter in model.named_parameters():
        scale = name.endswith(
            ("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "ln_q.weight")
        )
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.15)
    return model


def official(state):
    """The names that transformers had before 5, which those of the published checkpoints are."""

    def rename(name):
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    return {rename(name): x.detach().clone() for name, x in state.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What a Qwen2-VL folder has besides its weights."""
    folder = tmp_path_factory.mktemp("Qwen2-VL")
    vocab = {byte: i for i, byte in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_tokens(CHAT_TOKENS, special_tokens=True)
    assert len(tokenizer) == BASE_TOKENS
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"num_attention_heads": 4, "vision_config": {"num_heads": 2}})
    )
    return folder


@pytest.fixture(scope="module")
def hpsv3_files(tmp_path_factory):
    """(torch model, checkpoint, wheel)."""
    folder = tmp_path_factory.mktemp("HPSv3")
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    head = torch.nn.Sequential(
        linear(64, 24), relu, torch.nn.Dropout(0.05), linear(24, 8), relu, linear(8, 2)
    )
    model = random_model(1, 0, head)
    safetensors.torch.save_file(official(model.state_dict()), folder / "HPSv3.safetensors")
    with zipfile.ZipFile(folder / "hpsv3-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(templates.HPSV3_FILE, HPSV3_PY)
    return model, folder / "HPSv3.safetensors", folder / "hpsv3-1.0.0-py3-none-any.whl"


def with_lora(model, **options):
    targets = r".*language_model\.layers.*_proj"
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)
    )
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return lora.eval()


def videoreward(folder, said, files):
    """A folder of VideoReward with an older checkpoint too, which is not read."""
    (folder / "checkpoint-900").mkdir(parents=True)
    (folder / "checkpoint-11352").mkdir()
    (folder / "checkpoint-900" / "model.pth").write_bytes(b"")
    (folder / "model_config.json").write_text(json.dumps(said))
    (folder / "prompt_template.py").write_text(VIDEOALIGN_PY)
    for name, state in files.items():
        save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
        save(state, folder / "checkpoint-11352" / name)
    return folder


@pytest.fixture(scope="module")
def videoalign_files(tmp_path_factory):
    """(torch model, VideoReward)."""
    lora = with_lora(random_model(3, 1, torch.nn.Linear(64, 3, bias=False)))
    state = official(lora.state_dict())
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight" in state
    folder = tmp_path_factory.mktemp("VideoAlign") / "VideoReward"
    return lora.base_model.model, videoreward(folder, MODEL_CONFIG, {"model.pth": state})


@pytest.fixture(scope="module")
def hpsv3_weights(base, hpsv3_files, tmp_path_factory):
    _, checkpoint, wheel = hpsv3_files
    output = tmp_path_factory.mktemp("weights") / "hpsv3.safetensors"
    convert([checkpoint], output, base=base, templates=wheel)
    return output


@pytest.fixture(scope="module")
def videoalign_weights(base, videoalign_files, tmp_path_factory):
    _, folder = videoalign_files
    output = tmp_path_factory.mktemp("weights") / "videoalign.safetensors"
    convert([folder], output, base=base, templates=folder)
    return output


# ---------------------------------------------------------------- the reference


def videos(frames, height, width):
    """float32[2, frames, height, width, 3]: coloured noise with detail at every scale."""
    random = np.random.default_rng(0)
    coarse = (
        random.uniform(size=(2, frames, height // 8 + 1, width // 8 + 1, 3))
        .repeat(8, 2)
        .repeat(8, 3)
    )
    return np.float32(
        0.8 * coarse[:, :, :height, :width]
        + 0.2 * random.uniform(size=(2, frames, height, width, 3))
    )


def torch_outputs(model, base, reward_tokens, frames, pad, instruction):
    """The head's outputs at the reward tokens, of one clip uint8[frames, h, w, 3] that has its size
    already.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(reward_tokens)})
    frames = frames if len(frames) > 1 else np.repeat(frames, 2, axis=0)
    t, h, w = len(frames) // 2, frames.shape[1] // 14, frames.shape[2] // 14
    pixels = (
        torch.tensor(frames).float() / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])
    ) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    patches = pixels.permute(0, 3, 1, 2).reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 1176)
    chat = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {
                "role": "user",
                "content": f"<|vision_start|>{pad * (t * h * w // 4)}<|vision_end|>{instruction}",
            },
        ],
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor"
            " %}<|im_start|>assistant\n"
        ),
        tokenize=False,
    )
    ids = tokenizer(chat, return_tensors="pt").input_ids
    kind, name = (
        ("image", "pixel_values") if pad == "<|image_pad|>" else ("video", "pixel_values_videos")
    )
    with torch.no_grad():
        hidden = model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            **{name: patches, f"{kind}_grid_thw": torch.tensor([[t, h, w]])},
        ).last_hidden_state[0]
    at = torch.isin(ids[0], torch.tensor(tokenizer.convert_tokens_to_ids(list(reward_tokens))))
    return model.rm_head(hidden[at]).detach().numpy()


def torch_hpsv3(model, base, pixels):
    """mu of every frame of videos of 480 x 832, float[2, frames]."""

    def frame(x):
        return np.asarray(
            Image.fromarray(np.uint8(np.round(255 * x))).resize((588, 336), Image.BICUBIC)
        )[None]

    def mu(x, prompt):
        return torch_outputs(
            model, base, HPSV3_TOKENS, frame(x), "<|image_pad|>", HPSV3_TEXT.format(prompt)
        )[0, 0]

    return np.array(
        [[mu(x, prompt) for x in video] for video, prompt in zip(pixels, PROMPTS, strict=True)]
    )


def torch_videoalign(model, base, pixels, grey):
    """Normalised scores of clips of 36 frames of 126 x 210, float[2, 3].

    They become twice as large, where the weights within a frame are exact: no rounding error
    decides which pixel value is nearest.
    """
    scores = []
    for video, prompt in zip(pixels, PROMPTS, strict=True):
        frames = np.round(255 * video[[0, 12, 23, 35]])
        if grey:
            frames = (np.int64(frames) @ np.array([2989, 5870, 1140]) // 10000)[..., None].repeat(
                3, -1
            )
        frames = torch.tensor(frames).float().permute(0, 3, 1, 2)
        frames = torch.nn.functional.interpolate(frames, (252, 420), mode="bicubic", antialias=True)
        frames = frames.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        raw = torch_outputs(
            model, base, VIDEOALIGN_TOKENS, frames, "<|video_pad|>", VIDEOALIGN_TEXT.format(prompt)
        ).diagonal()
        said = MODEL_CONFIG["inference_config"]
        names = ("VQ", "MQ", "TA")
        scores.append(
            [(x - said[f"{n}_mean"]) / said[f"{n}_std"] for x, n in zip(raw, names, strict=True)]
        )
    return np.array(scores)


# ---------------------------------------------------------------- scores


def test_hpsv3(base, hpsv3_files, hpsv3_weights):
    """Means of mu over three frames each, on any number of devices and in batches of any size."""
    model, _, _ = hpsv3_files
    pixels = videos(3, 480, 832)
    mu = torch_hpsv3(model, base, pixels)
    scorer = hpsv3.load(hpsv3_weights)
    scores = composite.ask_clips(scorer, jnp.asarray(pixels)[:, None], PROMPTS)()
    assert scores.keys() == {"VQ", "VQ_best"} == set(scorers.COMPONENTS["hpsv3"]) and scores[
        "VQ"
    ].shape == (2, 1)
    np.testing.assert_allclose(scores["VQ"][:, 0], mu.mean(axis=1), atol=1e-4, rtol=0)
    assert np.ptp(mu, axis=1).min() > 0.01

    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), "data")
    again = hpsv3.load(hpsv3_weights, base, mesh=one, batch=4)(pixels, PROMPTS)
    np.testing.assert_allclose(again["VQ"], mu.mean(axis=1), atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        again["VQ_best"], mu.max(axis=1), atol=1e-4, rtol=0
    )  # of three, one is 30 %


def test_stored_pixels_are_scored_as_their_floats_are(hpsv3_weights, videoalign_weights):
    """Bit for bit. What a decoder stores is taken as it is, a quarter of the floats."""
    stored = np.random.default_rng(0).integers(0, 256, (2, 36, 56, 84, 3), np.uint8)
    for name, path in (("hpsv3", hpsv3_weights), ("videoalign", videoalign_weights)):
        scorer = scorers.Scorers(name, {name: path})
        floats = scorer(jnp.asarray(stored, jnp.float32) / 255, PROMPTS)
        for component, values in scorer(jnp.asarray(stored), PROMPTS).items():
            np.testing.assert_array_equal(values, floats[component], err_msg=component)
    assert {"hpsv3", "videoalign"} <= set(scorers.TAKES_BYTES)


def test_what_branches_share_is_scored_once(hpsv3_weights, videoalign_weights, monkeypatch):
    """Rewards of clips that end before a fork or straddle it are those of whole clips. HPSv3 takes
    each shared frame once, by one program for all forks.
    """
    rng, rows, real = np.random.default_rng(0), [], learned.raw_scores
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), "data")
    alone = hpsv3.load(hpsv3_weights, mesh=one, batch=3)
    step = learned.scoring_step(alone.args[0].cfg, one, preprocess.resize_pil)
    step.clear_cache()  # of what other tests have scored
    paths = {"hpsv3": hpsv3_weights, "videoalign": videoalign_weights}
    monkeypatch.setitem(scorers.SCORERS, "hpsv3", lambda paths: alone)
    scorer = scorers.Scorers("hpsv3,videoalign", paths)

    def counting(reward, resize, tokens, text_of_row, *rest, **options):
        rows.append(len(text_of_row))
        return real(reward, resize, tokens, text_of_row, *rest, **options)

    monkeypatch.setattr(learned, "raw_scores", counting)
    clips, sentences = [composite.Clip(0, 0, 4), composite.Clip(0, 4, 8)], [[p] for p in PROMPTS]
    for fork, scored in (
        (3, [2 * 3 + 6, 6, 6, 24, 6, 6]),  # three frames once for each of two prompts, then 3 x 2
        (5, [8, 2, 2, 2 * 1 + 6 * 3, 6, 6]),
    ):
        videos = rng.integers(0, 256, (2, 3, 8, 56, 84, 3), np.uint8)
        videos[:, :, :fork] = videos[:, :1, :fork]
        group = pixels_of(jnp.asarray(videos[:, 1:]), jnp.asarray(videos[:, 0]), fork)
        rows.clear()
        ours = composite.segment_rewards(scorer, group, sentences, clips)
        assert rows == scored  # HPSv3, VideoAlign in colour and in grey, of one clip and the other
        theirs = composite.segment_rewards(scorer, group.replace(fork=0), sentences, clips)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, atol=1e-5, rtol=0, err_msg=name)
        assert np.ptp(ours["VQ"], axis=1).min() > 1e-3
    assert step._cache_size() == 1


def test_bfloat16(base, hpsv3_files, hpsv3_weights, tmp_path):
    """As on accelerators: norms and head stay in float32, and the score is close."""
    _, checkpoint, wheel = hpsv3_files
    output = tmp_path / "hpsv3.safetensors"
    convert([checkpoint], output, base=base, templates=wheel, dtype="bfloat16")
    types = {name: x.dtype.name for name, x in tensors_of(output).items()}
    assert (
        types["backbone/layers/q/kernel"] == types["backbone/embed_tokens/embedding"] == "bfloat16"
    )
    assert types["backbone/norm/scale"] == types["head/fc1/kernel"] == "float32"
    pixels = videos(1, 56, 84)
    rough, exact = (hpsv3.load(path)(pixels, PROMPTS)["VQ"] for path in (output, hpsv3_weights))
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=3e-2, rtol=0)


def test_videoalign(base, videoalign_files, videoalign_weights):
    """Colour and grey, normalised; VQ and MQ are the same for another prompt, TA is not."""
    model, _ = videoalign_files
    pixels = videos(36, 126, 210)
    for axis in (2, 3):  # at a frame's edge, weights are not exact
        np.moveaxis(pixels, axis, 0)[[0, 1, 2, 3, -4, -3, -2, -1]] = 0.25
    vq, mq, ta = torch_videoalign(model, base, pixels, grey=False).T
    motion = torch_videoalign(model, base, pixels, grey=True)[:, 1]
    scorer = videoalign.load(videoalign_weights)
    scores = scorer(pixels, PROMPTS)
    expected = {
        "MQ": motion,
        "TA": ta,
        "videoalign_VQ": vq,
        "videoalign_MQ": mq,
        "Overall": vq + mq + ta,
    }
    assert scores.keys() == expected.keys() == set(scorers.COMPONENTS["videoalign"])
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, atol=1e-4, rtol=0, err_msg=name)
    assert np.abs(motion - mq).min() > 0.01

    other = scorer(pixels, PROMPTS[::-1])
    for name in ("MQ", "videoalign_VQ", "videoalign_MQ"):
        np.testing.assert_allclose(other[name], scores[name], atol=1e-5, rtol=0)
    assert np.abs(other["TA"] - scores["TA"]).min() > 0.01


def test_one_program_and_released(hpsv3_weights):
    """A second scorer of the same weights compiles nothing; dropping a scorer frees its weights."""
    pixels = videos(1, 56, 84)
    scorer = hpsv3.load(hpsv3_weights)
    reward = scorer.args[0]
    step = learned.scoring_step(reward.cfg, reward.mesh, preprocess.resize_pil)
    first, compiled = scorer(pixels, PROMPTS), step._cache_size()
    again = hpsv3.load(hpsv3_weights)(pixels, PROMPTS)
    assert step._cache_size() == compiled
    np.testing.assert_array_equal(first["VQ"], again["VQ"])
    weights = [weakref.ref(x) for x in jax.tree.leaves(reward.params)]
    del scorer, reward
    gc.collect()
    assert not any(ref() is not None for ref in weights)


def test_head():
    """Against torch's, of HPSv3's widths."""
    torch.manual_seed(0)
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    head = torch.nn.Sequential(
        linear(96, 64), relu, torch.nn.Dropout(0.05), linear(64, 16), relu, linear(16, 2)
    ).eval()
    cfg = RewardConfig(
        TextConfig(vocab=8, dim=96, heads=1, kv_heads=1, ffn_dim=8, layers=1),
        head=(64, 16, 2),
        head_bias=True,
        tokens=HPSV3_TOKENS,
        token_ids=(7,),
        template="",
        min_pixels=1,
        max_pixels=1,
    )
    params = {
        f"fc{i + 1}": {"kernel": x.weight.detach().numpy().T, "bias": x.bias.detach().numpy()}
        for i, x in enumerate([head[0], head[3], head[5]])
    }
    hidden = torch.randn(5, 96)
    ours = reward_model.RewardHead(cfg).apply({"params": params}, jnp.asarray(hidden.numpy()))
    np.testing.assert_allclose(ours, head(hidden).detach().numpy(), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- conversion


def test_converted_file(base, hpsv3_files, hpsv3_weights):
    """The config, the instruction and where tensors come from are noted, and the tokenizer is
    there.
    """
    _, checkpoint, _ = hpsv3_files
    with safetensors.safe_open(hpsv3_weights, framework="numpy") as file:
        metadata = file.metadata()
    cfg = config_from_dict(RewardConfig, json.loads(metadata["config"]))
    assert metadata["kind"] == "hpsv3"
    assert (cfg.text, cfg.vision, cfg.dtype) == (tiny(1).text, tiny(1).vision, "float32")
    assert (cfg.head, cfg.token_ids, cfg.image_token) == ((24, 8, 2), (BASE_TOKENS,), IMAGE_PAD)

    def pixels(cfg):
        return (cfg.min_pixels, cfg.max_pixels)  # HPSv3 gets frames of one size, whatever theirs is

    assert pixels(cfg) == pixels(reward_model.HPSV3) == (200_704, 200_704)
    assert cfg.template.format(text_prompt="{x}") == HPSV3_TEXT.format("{x}")
    assert [Path(source["file"]) for source in json.loads(metadata["manifest"])["sources"]] == [
        checkpoint
    ]
    assert "backbone/layers/q/kernel" in json.loads(metadata["manifest"])["tensors"]
    folder = learned.tokenizer_folder(hpsv3_weights)
    for path in base.glob("tokenizer*.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_adapter(base, videoalign_files, tmp_path):
    """Only what was trained, with rsLoRA: merged as in peft, the rest from the base model."""
    model = random_model(3, 2, torch.nn.Linear(64, 3, bias=False))
    untrained = official(model.state_dict())
    # The base model has other embeddings, more of them, its own vision tower and no head.
    untrained["model.embed_tokens.weight"] = torch.zeros(BASE_TOKENS + 9, 64)
    untrained = {
        name: 0 * x if "visual" in name else x
        for name, x in untrained.items()
        if "rm_head" not in name
    }
    folder = tmp_path / "Qwen2-VL"
    folder.mkdir()
    copy_tokenizer(base, folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    safetensors.torch.save_file(untrained, folder / "model.safetensors")

    lora = with_lora(model, use_rslora=True)
    trained = {
        f"base_model.model.{name}": x
        for name, x in official(model.state_dict()).items()
        if "lora" not in name
    }
    trained = {
        name: x
        for name, x in trained.items()
        if any(part in name for part in ("visual", "rm_head", "embed"))
    }
    adapter = official(peft.get_peft_model_state_dict(lora))
    said = {
        **MODEL_CONFIG,
        "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": True},
    }
    files = {"adapter_model.safetensors": adapter, "non_lora_state_dict.pth": trained}
    source = videoreward(tmp_path / "VideoReward", said, files)
    output = tmp_path / "out.safetensors"
    convert([source], output, base=folder, templates=source)

    merged = official(lora.merge_and_unload().state_dict())
    assert lora_scale(said["peft_lora_config"], RANK) == 4
    ours = tensors_of(output)
    for name, (path, layer) in reward_table(noted(output)).items():
        theirs = KINDS["videoalign"].to_ours(path, merged[name].numpy())
        np.testing.assert_allclose(
            ours[path] if layer is None else ours[path][layer], theirs, atol=1e-6, rtol=0
        )
    manifest = json.loads((tmp_path / "out.safetensors.manifest.json").read_text())
    assert {Path(x["file"]).name for x in manifest["sources"]} == {*files, "model.safetensors"}

    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        convert([source], output, base=folder, templates=source)
    with pytest.raises(ValueError, match="the weight itself, which --base has"):
        convert([source], output, templates=source)
    (source / "checkpoint-11352" / "adapter_config.json").write_text(
        json.dumps({"r": RANK, "lora_alpha": 3})
    )
    safetensors.torch.save_file(untrained, folder / "model.safetensors")
    with pytest.raises(ValueError, match="scale a LoRA by"):
        convert([source], output, base=folder, templates=source)


def noted(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return config_from_dict(VideoAlignConfig, json.loads(file.metadata()["config"]))


def test_lora_scale():
    for said, message in (
        ({"lora_r": 8, "lora_alpha": 8}, "rank 4 is stated to have rank 8"),
        ({"lora_r": 4}, "alpha None"),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "use_dora"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_scale(said, RANK)
    assert lora_scale({"r": 4, "lora_alpha": 8}, RANK) == 2


def test_every_tensor_is_used_and_none_is_missing(base, hpsv3_files, videoalign_files, tmp_path):
    output = tmp_path / "out.safetensors"
    model, _, wheel = hpsv3_files
    state = official(model.state_dict())
    for changed, message in (
        ({"rm_head.5.bias": None}, r"missing \['rm_head.5.bias'\]"),
        (
            {"model.layers.1.mlp.down_proj.weight": None},
            r"missing \['model.layers.1.mlp.down_proj.weight'\]",
        ),
        ({"rm_head.7.weight": torch.ones(2)}, r"left over \['rm_head.7.weight'\]"),
        ({"visual.pos_embed.weight": torch.ones(2)}, "visual.pos_embed.weight is not a tensor"),
        ({"rm_head.3.weight": torch.ones(8, 23)}, "rm_head.3.weight"),
    ):
        wrong = {name: x for name, x in {**state, **changed}.items() if x is not None}
        safetensors.torch.save_file(wrong, tmp_path / "HPSv3.safetensors")
        with pytest.raises(ValueError, match=message):
            convert([tmp_path / "HPSv3.safetensors"], output, base=base, templates=wheel)

    _, folder = videoalign_files
    state = torch.load(folder / "checkpoint-11352" / "model.pth")
    a = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    for number, (changed, message) in enumerate(
        [
            ({a: None}, "the LoRA of model.layers.0.mlp.up_proj.weight lacks A"),
            ({a: torch.ones(RANK, 3)}, "are not a LoRA of"),
            (
                {
                    "base_model.model.model.layers.0.mlp.up_proj.lora_C.default.weight": torch.ones(
                        2
                    )
                },
                "lora_C",
            ),
        ]
    ):
        wrong = {name: x for name, x in {**state, **changed}.items() if x is not None}
        source = videoreward(tmp_path / str(number), MODEL_CONFIG, {"model.pth": wrong})
        with pytest.raises(ValueError, match=message):
            convert([source], output, base=base, templates=source)
    assert not output.exists() and not learned.tokenizer_folder(output).exists()


def test_what_else_conversion_needs(base, hpsv3_files, videoalign_files, tmp_path):
    output = tmp_path / "out.safetensors"
    _, checkpoint, wheel = hpsv3_files
    with pytest.raises(ValueError, match="--base"):
        convert([checkpoint], output, templates=wheel)
    with pytest.raises(ValueError, match="--templates"):
        convert([checkpoint], output, base=base)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        convert([checkpoint], output, base=tmp_path, templates=wheel)
    copy_tokenizer(base, tmp_path)  # and no config.json with the numbers of heads
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert([checkpoint], output, base=tmp_path, templates=wheel)

    _, folder = videoalign_files
    state = torch.load(folder / "checkpoint-11352" / "model.pth")
    without = {name: value for name, value in MODEL_CONFIG.items() if name != "inference_config"}
    simple = {
        **MODEL_CONFIG,
        "data_config": {**MODEL_CONFIG["data_config"], "prompt_template_type": "simple"},
    }
    for name, said, message in (("a", without, "'inference_config'"), ("b", simple, "'simple'")):
        source = videoreward(tmp_path / name, said, {"model.pth": state})
        with pytest.raises(ValueError, match=message):
            convert([source], output, base=base, templates=source)
    (tmp_path / "a" / "checkpoint-11352" / "model.pth").unlink()
    with pytest.raises(ValueError, match="neither model.pth nor adapter_model"):
        convert([tmp_path / "a"], output)
    assert not output.exists()


def test_what_loading_needs(base, hpsv3_weights, tmp_path):
    with pytest.raises(ValueError, match="holds 'hpsv3', expected 'videoalign'"):
        videoalign.load(hpsv3_weights)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        hpsv3.load(tmp_path / "none.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="page.safetensors is not a safetensors file but a web p"):
        hpsv3.load(tmp_path / "page.safetensors")
    other = transformers.AutoTokenizer.from_pretrained(base)
    other.add_tokens(["<|before|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was made with"):
        hpsv3.load(hpsv3_weights, tmp_path / "other")
    scorer = hpsv3.load(hpsv3_weights)
    with pytest.raises(ValueError, match=r"has the special token <\|Reward\|>"):
        scorer(videos(1, 56, 84), ["a <|Reward|>", "b"])


def test_templates(hpsv3_files, tmp_path):
    """From a wheel, a folder and the file itself; a file that was changed is an error that says
    what it lacks.
    """
    _, _, wheel = hpsv3_files
    unpacked = tmp_path / templates.HPSV3_FILE
    unpacked.parent.mkdir(parents=True)
    unpacked.write_text(HPSV3_PY)
    made = [templates.hpsv3(source) for source in (wheel, tmp_path, unpacked)]
    assert set(made) == {HPSV3_TEXT.replace("{}", "{text_prompt}")}

    file = tmp_path / "prompt_template.py"
    for text, message in (
        (VIDEOALIGN_PY.replace("MQ", "XQ"), "once each and in this order"),
        (
            VIDEOALIGN_PY.replace("VQ", "MX").replace("MQ", "VQ").replace("MX", "MQ"),
            "in this order",
        ),
        (VIDEOALIGN_PY.replace("{text_prompt}", ""), "no place for a prompt"),
        (VIDEOALIGN_PY.replace("{text_prompt}", "{text}"), "not a format string"),
        (
            VIDEOALIGN_PY.replace("WITH_SPECIAL", ""),
            "assigns no string to DETAILED_PROMPT_WITH_SPECIAL_TOKEN",
        ),
        ("x = (", "no Python file"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            templates.videoalign(tmp_path)
    with pytest.raises(ValueError, match="no Python file"):
        templates.videoalign(tmp_path / "none")


# ---------------------------------------------------------------- full size


FULL_SIZE = {"hpsv3": reward_model.HPSV3, "videoalign": reward_model.VIDEOALIGN}


@pytest.mark.parametrize(
    "kind, tensors, count",
    [("hpsv3", 729 + 6, 7_744_923_136 + 3_687_474), ("videoalign", 729 + 1, 2_208_561_664 + 4608)],
)
def test_full_size(kind, tensors, count):
    """Names and numbers of the published models: 8.29 B with the 543,542,272 of HPSv3's language
    head, and 2.21 B.
    """
    cfg = FULL_SIZE[kind]
    ours = flax.traverse_util.flatten_dict(reward_model.abstract_params(cfg), sep="/")
    table = reward_table(cfg)
    assert len(table) == tensors and {path for path, _ in table.values()} == ours.keys()
    assert sum(x.size for x in ours.values()) == count
    published, language_head = {"hpsv3": (8.29, 151658 * 3584), "videoalign": (2.21, 0)}[kind]
    assert round((count + language_head) / 1e9, 2) == published


@pytest.mark.parametrize(
    "kind, rows, frames, width, limit", [("hpsv3", 16, 1, 640, 4), ("videoalign", 8, 4, 1408, 3)]
)
def test_scoring_step_fits_beside_a_rollout(kind, rows, frames, width, limit):
    """A device's batch of frames of 480 x 832, compiled ahead of time: GB besides the weights, here
    in float32.
    """
    cfg = dataclasses.replace(FULL_SIZE[kind], dtype="float32")
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), "data")
    resize = {"hpsv3": preprocess.resize_pil, "videoalign": preprocess.resize_torch}[kind]
    shaped = jax.ShapeDtypeStruct
    tokens = qwen2_vl.Tokens(
        ids=shaped((rows, width), jnp.int32),
        lengths=shaped((rows,), jnp.int32),
        at=shaped((rows, 1), jnp.int32),
    )
    clips = shaped((rows, frames, 480, 832, 3), jnp.uint8)
    step = learned.scoring_step(cfg, one, resize)
    memory = (
        step.lower(reward_model.abstract_params(cfg), tokens, clips).compile().memory_analysis()
    )
    assert memory.temp_size_in_bytes < limit * 1e9
