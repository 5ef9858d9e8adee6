"""CLIP, DINO and LAION's head from tiny random checkpoints in the layouts of their releases, by the
real converter, against transformers' torch models and VBench's formulas written out by hand.
"""

import copy
import dataclasses
import functools
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from convert_weights_test import convert
from jax.sharding import Mesh
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import cosine_similarity, interpolate, normalize

from kvpo_jax.errors import UsageError
from kvpo_jax.models import vit
from kvpo_jax.rewards import aesthetic, clip, composite, dino, features, learned, scorers

SENTENCES = ["a red disk", "It&#39;s  SNOW"]
VOCAB = 2 * 256 + 2
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
# Heads of 64 channels, as in every published CLIP and DINO, whose files need not say so.
CLIP_TEXT = SIZES | {
    "num_attention_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 12,
    "eos_token_id": VOCAB - 1,
    "bos_token_id": VOCAB - 2,
}
CLIP_VISION = SIZES | {"num_attention_heads": 1, "image_size": 32, "patch_size": 8}
DINO = SIZES | {"num_attention_heads": 4, "image_size": 64, "patch_size": 16}


def one_device():
    return Mesh(np.asarray(jax.devices()[:1]), "data")


# ---------------------------------------------------------------- checkpoints


def drawn_anew(model, seed):
    """The model with every parameter drawn anew, scales of norms and of layers around 1."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = "norm" in name and name.endswith("weight") or "lambda1" in name
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.1)
    return model.eval()


def clip_model(seed=0, **vision):
    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=CLIP_VISION | vision, projection_dim=24
    )
    return drawn_anew(transformers.CLIPModel(config), seed)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """(transformers' model, its folder with a tokenizer)."""
    folder, model = tmp_path_factory.mktemp("clip-vit-base-patch32"), clip_model()
    model.save_pretrained(folder)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = {word: number for number, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=tokens, merges=[]).save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def clip_weights(clip_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("weights") / "clip.safetensors"
    convert([clip_folder[1]], output)
    return output


def openai_state(model):
    """The state dict of a CLIPModel as OpenAI's own code names and shapes it."""
    hf = model.state_dict()

    def tower(theirs, ours, layers):
        out = {}
        for layer in range(layers):
            of, to = f"{theirs}.encoder.layers.{layer}", f"{ours}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                qkv = [hf[f"{of}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{to}.attn.in_proj_{kind}"] = torch.cat(qkv)
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    out[f"{to}.{b}.{kind}"] = hf[f"{of}.{a}.{kind}"]
        return out

    image, text = "vision_model.embeddings", "text_model.embeddings"
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    return {
        "visual.class_embedding": hf[f"{image}.class_embedding"],
        "visual.positional_embedding": hf[f"{image}.position_embedding.weight"],
        "visual.conv1.weight": hf[f"{image}.patch_embedding.weight"],
        "visual.proj": hf["visual_projection.weight"].T.contiguous(),
        "token_embedding.weight": hf[f"{text}.token_embedding.weight"],
        "positional_embedding": hf[f"{text}.position_embedding.weight"],
        "text_projection": hf["text_projection.weight"].T.contiguous(),
        "logit_scale": hf["logit_scale"],
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(VOCAB),
        **{f"{a}.{x}": hf[f"{b}.{x}"] for a, b in norms.items() for x in ("weight", "bias")},
        **tower("vision_model", "visual.", 2),
        **tower("text_model", "", 2),
    }


def dino_model(kind, seed=1):
    if kind == "dino":
        config = transformers.ViTConfig(**DINO, layer_norm_eps=1e-6)
        return drawn_anew(transformers.ViTModel(config, add_pooling_layer=False), seed)
    options = {name: x for name, x in DINO.items() if name != "intermediate_size"}
    return drawn_anew(transformers.Dinov2Model(transformers.Dinov2Config(**options)), seed)


def hub_state(model):
    """The state dict of a ViTModel or Dinov2Model as its authors' code names and shapes it."""
    hf = model.state_dict()
    dinov2 = "encoder.layer.0.norm1.weight" in hf
    layers = "encoder.layer" if dinov2 else "layers"
    norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    patches = "embeddings.patch_embeddings.projection"
    out = {
        "cls_token": hf["embeddings.cls_token"],
        "pos_embed": hf["embeddings.position_embeddings"],
    }
    if dinov2:
        out["mask_token"] = hf["embeddings.mask_token"]
    for x in ("weight", "bias"):
        out |= {f"patch_embed.proj.{x}": hf[f"{patches}.{x}"], f"norm.{x}": hf[f"layernorm.{x}"]}
        for layer in range(2):
            of, to = f"{layers}.{layer}", f"blocks.{layer}"
            qkv = [hf[f"{of}.attention.{y}_proj.{x}"] for y in "qkv"]
            out |= {
                f"{to}.attn.qkv.{x}": torch.cat(qkv),
                f"{to}.attn.proj.{x}": hf[f"{of}.attention.o_proj.{x}"],
                f"{to}.norm1.{x}": hf[f"{of}.{norms[0]}.{x}"],
                f"{to}.norm2.{x}": hf[f"{of}.{norms[1]}.{x}"],
                f"{to}.mlp.fc1.{x}": hf[f"{of}.mlp.fc1.{x}"],
                f"{to}.mlp.fc2.{x}": hf[f"{of}.mlp.fc2.{x}"],
            }
    if dinov2:
        for layer in range(2):
            for i in (1, 2):
                scale = hf[f"encoder.layer.{layer}.layer_scale{i}.lambda1"]
                out[f"blocks.{layer}.ls{i}.gamma"] = scale
    return out


@pytest.fixture(scope="module", params=["dino", "dinov2"])
def dino_files(request, tmp_path_factory):
    """(transformers' model, its weights converted)."""
    folder, model = tmp_path_factory.mktemp(request.param), dino_model(request.param)
    model.save_pretrained(folder / "hub")
    convert([folder / "hub"], folder / "dino.safetensors")
    return model, folder / "dino.safetensors"


@pytest.fixture(scope="module", params=["linear", "mlp"])
def aesthetic_files(request, tmp_path_factory):
    """(transformers' CLIP, torch's head, weights converted)."""
    folder, model = tmp_path_factory.mktemp("aesthetic"), clip_model(seed=2)
    model.save_pretrained(folder / "clip-vit-large-patch14")
    linear, dropout = torch.nn.Linear, torch.nn.Dropout(0.2)
    torch.manual_seed(3)
    if request.param == "linear":
        head = linear(24, 1)
        state = head.state_dict()
    else:
        widths = [(24, 16), (16, 8), (8, 6), (6, 4), (4, 1)]
        a, b, c, d, e = (linear(*width) for width in widths)
        head = torch.nn.Sequential(a, dropout, b, dropout, c, dropout, d, e).eval()
        state = {f"layers.{name}": x for name, x in head.state_dict().items()}
    torch.save(state, folder / "head.pth")
    output = folder / "aesthetic.safetensors"
    convert([folder / "head.pth"], output, base=folder / "clip-vit-large-patch14")
    return model, head, output


# ---------------------------------------------------------------- the reference


def videos(frames=5, height=30, width=52):
    """uint8[2, frames, height, width, 3]: coloured noise that changes slowly."""
    random = np.random.default_rng(0)
    first, last = random.uniform(size=(2, 2, 1, height, width, 3))
    share = np.linspace(0, 0.3, frames)[:, None, None, None]
    return np.uint8(np.round(255 * ((1 - share) * first + share * last)))


def pictures(side, width=None):
    """Normalised pixels float32[3, side, width, 3]."""
    return np.random.default_rng(4).normal(size=(3, side, width or side, 3)).astype(np.float32)


def channels_first(pixels):
    return torch.tensor(np.moveaxis(np.asarray(pixels), -1, -3))


def vbench_clip_input(video, side):
    """VBench's clip_transform of uint8[frames, h, w, 3], by torch, as torchvision computes it."""
    pixels = channels_first(video).float()
    height, width = video.shape[1:3]
    size = [int(side * x / min(height, width)) for x in (height, width)]
    pixels = interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=False)
    top, left = (round((x - side) / 2) for x in size)
    pixels = pixels[..., top : top + side, left : left + side] / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    return (pixels - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def vbench_consistency(seen):
    """The formula of VBench's subject and background consistency, frame by frame."""
    total = 0.0
    for i in range(1, len(seen)):
        before = max(0.0, cosine_similarity(seen[i - 1], seen[i], dim=-1).item())
        first = max(0.0, cosine_similarity(seen[0], seen[i], dim=-1).item())
        total += (before + first) / 2
    return total / (len(seen) - 1)


# ---------------------------------------------------------------- networks


def read(path, kind, config):
    tower = features.load(path, kind, config, one_device(), 4)
    return tower.params, tower.cfg


def compiled(function, cfg):
    return jax.jit(functools.partial(function, cfg))


def test_both_towers_of_clip_are_those_of_transformers(clip_folder, clip_weights):
    model, folder = clip_folder
    params, cfg = read(clip_weights, "clip", vit.CLIPConfig)
    assert (cfg.vision.pixels, cfg.vision.activation, cfg.text.context) == (32, "quick_gelu", 12)
    images = pictures(32)
    ids, ends = clip.tokenizer(folder, cfg.text)(["a disk", "", "long " * 9])
    assert ends.tolist() == [6, 1, 11]  # the third is cut, and ends all the same
    with torch.no_grad():
        image = model.get_image_features(pixel_values=channels_first(images)).pooler_output
        text = model.get_text_features(input_ids=torch.tensor(ids)).pooler_output
    ours = compiled(vit.image_features, cfg)(params, images)
    np.testing.assert_allclose(ours, normalize(image, dim=-1), atol=2e-5)
    ours = compiled(vit.text_features, cfg)(params, ids, ends)
    np.testing.assert_allclose(ours, normalize(text, dim=-1), atol=2e-5)


def test_sentences_are_cleaned_as_openai_does(clip_folder, clip_weights):
    _, cfg = read(clip_weights, "clip", vit.CLIPConfig)
    encode = clip.tokenizer(clip_folder[1], cfg.text)
    np.testing.assert_array_equal(*encode(["it's  &amp;amp; \n", "IT'S &"])[0])


def test_dino_is_that_of_transformers(dino_files):
    """At the size that there are positions for, and at another one, where they are interpolated."""
    model, weights = dino_files
    params, cfg = read(weights, "dino", vit.ViTConfig)
    assert cfg.vision.layer_scale == (model.config.model_type == "dinov2")
    assert (cfg.vision.heads, cfg.vision.side, cfg.vision.offset) == (4, 4, 0.1)
    options = {} if cfg.vision.layer_scale else {"interpolate_pos_encoding": True}
    plain = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, offset=0.0))
    for images, config in ((pictures(64), cfg), (pictures(48, 117), plain)):
        with torch.no_grad():
            theirs = model(channels_first(images), **options).last_hidden_state[:, 0]
        ours = compiled(vit.image_features, config)(params, images)
        np.testing.assert_allclose(ours, normalize(theirs, dim=-1), atol=2e-5)


def test_positions_are_interpolated_as_dinos_authors_do():
    """torch is given the scale of a grid that is a tenth of a patch larger."""
    positions = np.random.default_rng(5).normal(size=(1 + 16, 6)).astype(np.float32)
    square = channels_first(positions[1:].reshape(1, 4, 4, 6))
    theirs = interpolate(square, scale_factor=(3.1 / 4, 7.1 / 4), mode="bicubic")
    cfg = vit.VisionConfig(6, 6, 1, 1, patch=16, side=4)
    ours = vit.interpolated(cfg, jnp.asarray(positions), 3, 7)
    np.testing.assert_array_equal(ours[0], positions[0])
    np.testing.assert_allclose(ours[1:], theirs[0].flatten(1).T, atol=1e-5)


def test_aesthetic_scores_are_those_of_torch(aesthetic_files):
    model, head, weights = aesthetic_files
    params, cfg = read(weights, "aesthetic", vit.AestheticConfig)
    images = pictures(32)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=channels_first(images)).pooler_output
        theirs = head(normalize(image, dim=-1))
    ours = compiled(vit.aesthetic_scores, cfg)(params, images)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_sizes_of_the_published_models():
    """The counts of their authors; ours have no scale of the logits, and no text tower of L/14."""

    def count(cfg):
        return sum(x.size for x in jax.tree.leaves(vit.abstract_params(cfg)))

    assert count(vit.CLIP_B32) == 151_277_313 - 1
    assert count(vit.DINO_B16) == 85_798_656
    assert count(vit.AESTHETIC_L14) == 303_966_208 + 768 + 1


# ---------------------------------------------------------------- layouts


def same_weights(path, other):
    ours, theirs = (safetensors.numpy.load_file(x) for x in (path, other))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)
    notes = [safetensors.safe_open(x, "numpy").metadata() for x in (path, other)]
    assert notes[0]["kind"] == notes[1]["kind"]
    return [json.loads(x["config"]) for x in notes]


def test_openais_layout(clip_folder, clip_weights, tmp_path):
    """As a state dict, with a tokenizer from elsewhere; in half precision as the released file."""
    model, folder = clip_folder
    torch.save(openai_state(model), tmp_path / "ViT-B-32.pt")
    convert([tmp_path / "ViT-B-32.pt"], tmp_path / "clip.safetensors", base=folder)
    first, second = same_weights(clip_weights, tmp_path / "clip.safetensors")
    assert first == second
    state = openai_state(model)
    half = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    torch.save(half, tmp_path / "half.pt")
    convert([tmp_path / "half.pt"], tmp_path / "half.safetensors", base=folder)
    assert read(tmp_path / "half.safetensors", "clip", vit.CLIPConfig)[1].dtype == "float16"


def scripted(state):
    """A module with these tensors that TorchScript can save."""
    root = torch.nn.Module()
    for name, x in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        if leaf == "attn_mask":  # which is neither a parameter nor a buffer
            setattr(module, leaf, x)
        elif x.is_floating_point():
            module.register_parameter(leaf, torch.nn.Parameter(x))
        else:
            module.register_buffer(leaf, x)
    return torch.jit.script(root)


def test_openais_program(clip_folder, tmp_path):
    """The released file is one of TorchScript, in half precision; tensors may be views."""
    model, folder = clip_folder
    state = {
        name: x.half() if x.is_floating_point() else x for name, x in openai_state(model).items()
    }
    state["visual.proj"] = state["visual.proj"].T.contiguous().T
    torch.save(state, tmp_path / "state.pt")
    mask = {f"transformer.resblocks.{i}.attn_mask": torch.ones(12, 12) for i in (0, 1)}
    scripted(state | mask).save(tmp_path / "ViT-B-32.pt")
    for name in ("state", "ViT-B-32"):
        convert([tmp_path / f"{name}.pt"], tmp_path / f"{name}.safetensors", base=folder)
    first, second = same_weights(tmp_path / "state.safetensors", tmp_path / "ViT-B-32.safetensors")
    assert first == second and first["dtype"] == "float16"


def tensor_of(shape, strides):
    """A pickle of a module of one tensor of three halves, as TorchScript writes it."""
    size, stride = (b"(" + b"".join(b"K%c" % n for n in x) + b"t" for x in (shape, strides))
    storage = b"(X\x07\0\0\0storagectorch\nHalfStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x03tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + size + stride + b"\x89NtR"
    return b"\x80\x02c__torch__\nM\n)\x81}(X\x06\0\0\0number" + made + b"ub."


def test_no_program_is_run_and_none_reads_beyond_its_tensors(tmp_path):
    path, ran = tmp_path / "model.pt", tmp_path / "ran"

    def fails(message, pickled):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("m/data.pkl", pickled)
            file.writestr("m/constants.pkl", b"\x80\x02).")
            file.writestr("m/data/0", np.ones(3, np.float16).tobytes())
        with pytest.raises(UsageError, match=message) as error:
            convert([path], tmp_path / "out.safetensors")
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    fails("it has 1 tensors, number", tensor_of((3,), (1,)))
    fails("it has 1 tensors, number", tensor_of((3, 9), (1, 0)))
    command = f"touch {ran}".encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    fails("has no tensors; name", b"\x80\x02cos\nsystem\n(" + text + b"tR.")
    fails("has no tensors; name", b"\x80\x02cbuiltins\neval\n(" + text + b"tR}b.")
    beyond = r"\(ValueError: a tensor of shape .* reaches beyond its storage\); download or copy it"
    fails(beyond, tensor_of((4,), (1,)))
    fails(beyond, tensor_of((2, 2), (1, 2)))
    fails("cannot be read", b"\x80\x02(")
    fails("cannot be read", b"\x80\x02}.")
    assert not ran.exists()
    torch.save({}, path)  # of torch.save, as of any other program
    with pytest.raises(UsageError, match="model.pt has no tensors"):
        convert([path], tmp_path / "out.safetensors")


def test_open_clips_config_says_which_gelu(clip_folder, tmp_path):
    model, folder = clip_folder
    torch.save(openai_state(model), tmp_path / "open_clip_pytorch_model.bin")
    for said, activation in (({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": said}))
        convert([tmp_path], tmp_path / "out" / "clip.safetensors", base=folder)
        cfg = read(tmp_path / "out" / "clip.safetensors", "clip", vit.CLIPConfig)[1]
        assert cfg.vision.activation == cfg.text.activation == activation


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_the_layout_of_dinos_authors(kind, tmp_path):
    """It is that of timm too. No file says the heads of a width that is not made of 64."""
    model = dino_model(kind)
    model.save_pretrained(tmp_path / "hub")
    convert([tmp_path / "hub"], tmp_path / "a.safetensors")
    torch.save(hub_state(model), tmp_path / "dino_vitbase16_pretrain.pth")
    source = [tmp_path / "dino_vitbase16_pretrain.pth"]
    convert(source, tmp_path / "b.safetensors", num_heads=4)
    first, second = same_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert first == second
    with pytest.raises(ValueError, match="width 64 is not made of 5 heads"):
        convert(source, tmp_path / "c.safetensors", num_heads=5)
    # As the module's own names are, without save_pretrained.
    torch.save(model.state_dict(), tmp_path / "hub" / "own.pt")
    convert([tmp_path / "hub" / "own.pt"], tmp_path / "d.safetensors")
    same_weights(tmp_path / "a.safetensors", tmp_path / "d.safetensors")


def test_what_cannot_be_converted_is_said(clip_folder, tmp_path):
    model, folder = clip_folder
    out, files = tmp_path / "out.safetensors", {}

    def save(name, state):
        files[name] = tmp_path / f"{name}.pt"
        torch.save(state, files[name])

    state = openai_state(model)
    save("whole", state)
    save("image", {name: x for name, x in state.items() if name.startswith("visual.")})
    save("short", {name: x for name, x in state.items() if "resblocks.1.ln_2" not in name})
    save("registers", hub_state(dino_model("dinov2")) | {"register_tokens": torch.ones(1, 4, 64)})
    save("head", {"weight": torch.ones(1, 768), "bias": torch.ones(1)})
    for name, options, message in (
        ("whole", {}, "CLIP's tokenizer .* name its folder with --base"),
        ("image", {"base": folder}, "CLIP with a text tower: token_embedding.weight is missing"),
        ("short", {"base": folder}, "missing .'resblocks.1.ln_2.bias'"),
        ("registers", {"num_heads": 4}, "left over .'register_tokens'"),
        ("head", {}, "name its file or folder with --base"),
        ("head", {"base": folder}, "the head takes 768 numbers .* have 24"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            convert([files[name]], out, **options)
        assert str(files[name]) in str(error.value) and not out.exists()


# ---------------------------------------------------------------- scores


def clip_by_hand(model, folder, clips):
    """CLIP score over some and over all frames, and background consistency, of torch."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = ["a red disk", "it's snow"]  # what the sentences are once they are clean
    out = []
    for video, sentence in zip(clips, texts, strict=True):
        ids = tokenizer(sentence, truncation=True, max_length=12, return_tensors="pt").input_ids
        pixels = vbench_clip_input(video, 32)
        with torch.no_grad():
            seen = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            text = normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        fit = 100 * (seen @ text.T).numpy()[:, 0]
        middle = [0, 1, 2, 3, 5, 6, 7, 8]  # of 10 frames: parts of 1, 1, 1, 2 frames, twice
        out.append((fit[middle].mean(), fit.mean(), vbench_consistency(seen)))
    return np.transpose(out)


def test_clip_scores_are_vbenchs(clip_folder, clip_weights):
    """On all devices, in bytes and in floats."""
    clips = videos(10)
    score, want = clip.load(clip_weights, batch=3), clip_by_hand(*clip_folder, clips)
    for pixels in (clips, jnp.asarray(clips, jnp.float32) / 255):
        got = score(pixels, SENTENCES)
        assert tuple(got) == scorers.COMPONENTS["clip"]
        np.testing.assert_allclose(list(got.values()), want, atol=5e-4)


def test_subject_consistency_is_vbenchs(dino_files):
    """Frames of 30 x 52 become 224 x 388, of which 14 x 24 patches of 16 are seen."""
    model, weights = dino_files
    clips = videos(4)
    seen = []
    for video in clips:
        size = (224, int(224 * 52 / 30))
        pixels = interpolate(channels_first(video).float(), size, mode="bilinear") / 255
        pixels = pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        pixels = pixels / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        own_positions = with_positions(model, 14, 24)
        with torch.no_grad():
            seen.append(normalize(own_positions(pixels[..., :384]), dim=-1))
    got = dino.load(weights, one_device())(clips, SENTENCES)
    want = [vbench_consistency(of_video) for of_video in seen]
    assert 0 < min(want) and max(want) < 0.999
    np.testing.assert_allclose(got["subject_consistency"], want, atol=2e-4)


def with_positions(model, rows, columns):
    """transformers' model as a function of pixels, with positions that DINO's code interpolates."""
    own = model.embeddings.position_embeddings.data
    square = own[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / 4, (columns + 0.1) / 4)
    new = interpolate(square, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
    model = copy.deepcopy(model)
    embeddings = model.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat([own[:, :1], new], dim=1))
    embeddings.interpolate_pos_encoding = lambda x, height, width: embeddings.position_embeddings
    options = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    return lambda pixels: model(pixels, **options).last_hidden_state[:, 0]


def test_aesthetic_quality_is_vbenchs(aesthetic_files):
    model, head, weights = aesthetic_files
    clips = videos()
    got = aesthetic.load(weights, one_device())(clips, SENTENCES)["aesthetic_quality"]
    for video, score in zip(clips, got, strict=True):
        pixels = vbench_clip_input(video, 32)
        with torch.no_grad():
            seen = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            want = (head(seen).squeeze() / 10).mean()
        np.testing.assert_allclose(score, want, atol=1e-5)


def test_consistency_by_hand():
    """Frames at 0, 60 and 180 degrees: (1/2 + 1/2)/2 = 1/2, then both cosines count as 0."""
    angles = np.deg2rad([0, 60, 180])
    seen = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1))[None]
    np.testing.assert_allclose(features.consistency(seen), [0.25], atol=1e-6)
    assert features.consistency(seen[:, :1]).tolist() == [1.0]


def test_shared_frames_are_read_once(clip_weights, monkeypatch):
    """Of two clips whose first three frames of five are the same, eight; the scores stay."""
    clips = videos()
    clips[1, :3] = clips[0, :3]
    score, read_rows = clip.load(clip_weights, mesh=one_device()), []
    want = score(clips, SENTENCES)
    own = learned.in_batches

    def counted(step, inputs, mesh, rows, at_once):
        read_rows.append(rows)
        return own(step, inputs, mesh, rows, at_once)

    monkeypatch.setattr(learned, "in_batches", counted)
    got = score(clips, SENTENCES, composite.Shared(2, 3))
    assert read_rows == [7, 2]  # frames, sentences
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, atol=1e-4)


@pytest.mark.parametrize("dino_files", ["dino"], indirect=True)
@pytest.mark.parametrize("aesthetic_files", ["linear"], indirect=True)
def test_scorers_by_name(clip_weights, dino_files, aesthetic_files):
    """All at once, as rewards: of bytes, weighed, and known before anything is loaded."""
    names = "clip,dino,aesthetic"
    paths = {"clip": clip_weights, "dino": dino_files[1], "aesthetic": aesthetic_files[2]}
    clips = jnp.asarray(videos()[None])  # [P, T, ...]
    scores = composite.ask_clips(scorers.Scorers(names, paths), clips, ["a disk"], shared=1)()
    assert list(scores) == scorers.components_of(names)
    total = composite.composite(scores, {"clip_score": 1.0, "subject_consistency": 2.0})
    want = scores["clip_score"] + 2 * scores["subject_consistency"]
    np.testing.assert_allclose(total, want, rtol=1e-6)
    scorers.Scorers(names, paths).check()
    with pytest.raises(UsageError, match="clip.safetensors holds 'clip', expected 'dino': make it"):
        scorers.Scorers("dino", {"dino": clip_weights}).check()


def test_a_tokenizer_of_other_weights_is_refused(clip_folder, clip_weights):
    _, cfg = read(clip_weights, "clip", vit.CLIPConfig)
    fewer = dataclasses.replace(cfg.text, vocab=VOCAB - 1)
    with pytest.raises(ValueError, match=f"has {VOCAB} tokens, the weights {VOCAB - 1}"):
        clip.tokenizer(clip_folder[1], fewer)
    with pytest.raises(FileNotFoundError, match="no tokenizer .* a folder of CLIP"):
        clip.tokenizer(clip_folder[1] / "none", cfg.text)
