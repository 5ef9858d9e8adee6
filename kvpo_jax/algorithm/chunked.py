"""Sums over the steps of a branch, chunk by chunk; their gradient runs no chunk forward twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from kvpo_jax.types import Array, PyTree

Seen = dict[str, Array]
# (lora, frozen, states [R]) -> float[R], and what is seen on the way, name -> float[R].
StepValues = Callable[[PyTree, PyTree, PyTree], tuple[Array, Seen]]


def fold(states: PyTree, leading: int, *axes: int) -> PyTree:
    """Every leaf's first `leading` axes, folded into `axes`."""
    return jax.tree.map(lambda x: x.reshape(*axes, *x.shape[leading:]), states)


def largest_chunk(chunk: int, count: int) -> int:
    """The most of `count` states that `chunk` allows and that divides them; 0 allows all."""
    return max(n for n in range(1, min(chunk or count, count) + 1) if count % n == 0)


def map_chunks(function: Callable[[PyTree], PyTree], states: PyTree, count: int, chunk: int):
    """function(states), [R, ...] for states [R], with R = `count`, at most `chunk` at a time."""
    size = largest_chunk(chunk, count)
    if size == count:
        return function(states)
    out = jax.lax.map(function, fold(states, 1, -1, size))
    return fold(out, 2, count)


def if_wanted(
    pull: Callable[[Array], tuple[PyTree]], value: Array, like: PyTree, wanted: Array | bool
) -> PyTree:
    """The gradient of a float[], `pull` of jax.vjp at 1, where it is wanted; zeros where not.

    The value is then that of the same compiled program either way, to the last bit.
    """

    def gradient() -> PyTree:
        return pull(jnp.ones_like(value))[0]

    return jax.lax.cond(wanted, gradient, lambda: jax.tree.map(jnp.zeros_like, like))


def sum_over_steps(
    step_values: StepValues,
    lora: PyTree,
    frozen: PyTree,
    states: PyTree,
    chunk: int,
    wanted: Array | bool,
    seen: Sequence[str] = (),
) -> tuple[Array, Seen]:
    """float[P, G]: the sum of step_values over the last axis of states [P, G, N].

    Likewise of what is seen, which carries no gradient.

    With chunks, the gradient is accumulated in the forward pass. The loss depends on lora through
    the sums only, so dL/dlora = sum_g (dL/dE_g) (dE_g/dlora): the forward pass keeps dE_g/dlora of
    every branch, and the backward pass forms the weighted sum. No chunk runs forward twice, and
    memory is that of one chunk and of one LoRA tree per branch.

    Args:
      step_values: must not close over arrays.
      lora: what the gradient is of.
      frozen: other arrays that step_values needs. With chunks they get no gradient.
      states: a struct of arrays with the axes [P, G, N, ...].
      chunk: states at a time; 0 takes all in one batch.
      wanted: bool[], whether the gradient will be read; with chunks it costs nothing if not.
      seen: the names of what is seen.
    """
    p, g, n = jax.tree.leaves(states)[0].shape[:3]
    if not chunk or chunk >= p * g * n:
        values = step_values(lora, frozen, fold(states, 3, -1))
        return jax.tree.map(lambda x: x.reshape(p, g, n).sum(axis=-1), values)

    def sums_of_chunk(lora: PyTree, frozen: PyTree, states: PyTree) -> tuple[Array, Seen]:
        return jax.tree.map(jnp.sum, step_values(lora, frozen, states))

    @jax.custom_vjp
    def total(
        lora: PyTree, frozen: PyTree, states: PyTree, wanted: Array | bool
    ) -> tuple[Array, Seen]:
        values = partial(step_values, lora, frozen)
        flat = map_chunks(values, fold(states, 3, -1), p * g * n, chunk)
        return jax.tree.map(lambda x: x.reshape(p * g, -1).sum(axis=-1), flat)

    def with_gradients(
        lora: PyTree, frozen: PyTree, states: PyTree, wanted: Array | bool
    ) -> tuple[tuple[Array, Seen], PyTree]:
        def add(so_far: PyTree, states: PyTree) -> tuple[PyTree, None]:
            value, pull, noted = jax.vjp(
                lambda lora: sums_of_chunk(lora, frozen, states), lora, has_aux=True
            )
            gradient = if_wanted(pull, value, lora, wanted)
            return jax.tree.map(jnp.add, so_far, ((value, noted), gradient)), None

        def of_branch(states: PyTree) -> tuple[tuple[Array, Seen], PyTree]:
            size = min(chunk, n)
            whole = n - n % size
            first = jax.tree.leaves(states)[0].reshape(-1)[0]  # a float of the right sharding
            chunks = fold(jax.tree.map(lambda x: x[:whole], states), 1, -1, size)
            zero = jnp.zeros_like(first)
            sums = (zero, dict.fromkeys(seen, zero)), jax.tree.map(jnp.zeros_like, lora)
            sums, _ = jax.lax.scan(add, sums, chunks)
            rest = jax.tree.map(lambda x: x[whole:], states)
            return sums if whole == n else add(sums, rest)[0]

        return jax.lax.map(of_branch, fold(states, 3, p * g, n))

    def weigh(gradients: PyTree, weights: tuple[Array, Seen]) -> tuple[PyTree, None, None, None]:
        of_lora = jax.tree.map(lambda x: jnp.tensordot(weights[0], x, axes=1), gradients)
        return of_lora, None, None, None

    total.defvjp(with_gradients, weigh)
    return fold(total(lora, frozen, states, wanted), 1, p, g)
