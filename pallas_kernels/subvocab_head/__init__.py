"""The draft's LM head over a sub-vocabulary: log-probabilities and indices of its k best tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.batching import by_rows
from pallas_kernels.dispatch import Implementation, choose, power_of_two
from pallas_kernels.subvocab_head import triton, xla
from pallas_kernels.subvocab_head.heads import Extra, Head
from pallas_kernels.subvocab_head.triton import Config

__all__ = ["Config", "Extra", "quantised", "subvocab_top_k"]

MOST_ROWS = 64  # of the kernel, which keeps all of them on chip; beyond, a product is no matter of bytes any more


def subvocab_top_k(
    x: Array,
    head: Array,
    k: int,
    scale: Array | None = None,
    ids: Array | None = None,
    extra: Extra | None = None,
    *,
    implementation: Implementation = "auto",
    config: Config | None = None,
) -> tuple[Array, Array]:
    """The k most probable rows of the head under the softmax over all of its rows, and over those of `extra`.

    Args:
      x: [M, H] predicted features. head: [V', H]. k: at most V'.
      scale: [V'] float32, what each row of a head of int8 is multiplied by; None for a head of floats.
      ids: [V'] int32, what each row stands for; None: its own number.
      extra: further rows after those of the head, of other ids.
      implementation: see `dispatch`; more than `MOST_ROWS` rows are XLA's in any case. config: the kernel's, instead of
        the one chosen for the shape.

    Returns:
      Log-probabilities [M, k], float32, descending, and the rows' ids [M, k], int32; of equal logits the lower row
      comes first.
    """

    def together(x: Array, shared: Head) -> tuple[Array, Array]:
        return _of_rows(x, shared, None, k, implementation, config)

    whole = Head(head, scale, ids)
    if extra is None:
        return by_rows(together, x, whole)
    # Each text has extra rows of its own. XLA's product with the head is one for all texts even so.
    return _of_rows(x, whole, extra, k, implementation, config)


def _of_rows(
    x: Array, head: Head, extra: Extra | None, k: int, implementation: Implementation, config: Config | None
) -> tuple[Array, Array]:
    """`subvocab_top_k` of rows that are all there are."""
    # Rows are padded to a power of two, so one row costs what ten do.
    shape = {"rows": power_of_two(x.shape[0]), "hidden": x.shape[1], "vocabulary": head.weight.shape[0]}
    default = config or Config.suited_to(x.shape[1])
    implementation, chosen = choose(implementation, "subvocab_head", head.weight.dtype, shape, default)
    if implementation == "xla" or x.shape[0] > MOST_ROWS:
        return xla.subvocab_top_k(x, head, k, extra)
    return triton.subvocab_top_k(x, head, k, extra, chosen, interpret=implementation == "interpret")


def quantised(head: Array) -> tuple[Array, Array]:
    """A head [V', H] as int8, and the scale [V'] float32 of each row: half the bytes of bfloat16.

    A draft may be rounded at will: it proposes, and the target alone decides.
    """
    wide = head.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return jnp.round(wide / scale[:, None]).astype(jnp.int8), scale
