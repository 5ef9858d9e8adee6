"""What is called float32 is float32 on a GPU, too: no product of float32 is left to TF32."""

import re

import jax
import pytest
from equipment import SMALLEST, configure

from kvpo_jax import memory, programs
from kvpo_jax.models import umt5

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*: \((.*?)\) ->")


def float32_products(function, *arguments) -> list[str]:
    """The products of float32 in a program as it would be compiled for CUDA."""
    with jax.default_matmul_precision("default"):  # as it is for a user
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    products = [line for line in lowered.as_text().splitlines() if PRODUCT.search(line)]
    return [line for line in products if "f32>" in PRODUCT.search(line)[1]]


def rounded(products: list[str]) -> list[str]:
    """Those whose factors a GPU may round to TF32."""
    return [line for line in products if line.count("HIGHEST") != 2]


def test_the_test_sees_a_product_that_may_be_rounded():
    x = jax.ShapeDtypeStruct((3, 3), "float32")
    found = float32_products(jax.jit(lambda a, b: a @ b), x, x)
    assert len(found) == 1 and rounded(found) == found
    half = jax.ShapeDtypeStruct((3, 3), "bfloat16")
    assert float32_products(jax.jit(lambda a, b: a @ b), half, half) == []


@pytest.mark.parametrize(
    "spec, fields",
    [
        ("configs/tiny.py", {}),
        ("configs/tiny.py:release", {}),
        ("configs/longlive.py", {"model.dtype": "float32"}),
        ("configs/longlive.py", {"model.dtype": "bfloat16"}),
    ],
)
def test_no_program_of_a_run_rounds_float32(spec, fields):
    """Generation, decoding, replay with its gradient, and rewards with their float32 heads."""
    small = {name: x for name, x in SMALLEST.items() if name.startswith(("model", "lora"))}
    small.pop("model.channels")  # as many as the VAE has
    few = {"train.prompts_per_iteration": 1, "rollout.branches": 2, "train.micro_batch": 1}
    sizes = small | few if "longlive" in spec else few
    config = configure(spec, {**sizes, **fields})
    planned = memory.plan(config, jax.devices()[:1])
    counts = {}
    for title, program in planned.programs.items():
        products = float32_products(program.function, *program.arguments)
        assert rounded(products) == [], title
        counts[title] = len(products)
    assert counts["replay"]  # in bfloat16 the embedding of time, and its gradient
    assert len(counts) >= 5


def test_the_text_encoder_does_not_round_float32():
    cfg = umt5.UMT5Config(
        vocab=7, dim=8, heads=2, head_dim=4, ffn_dim=8, layers=1, buckets=4, dtype="float32"
    )
    ids = jax.ShapeDtypeStruct((1, 4), "int32")
    mask = jax.ShapeDtypeStruct((1, 4), "bool")
    encode = programs.text_encoder(cfg)
    products = float32_products(encode, umt5.abstract_params(cfg), ids, mask)
    assert products and rounded(products) == []
