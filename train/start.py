"""Where the training of an EAGLE draft starts: the units that its weights are trained in, and its first weights.

A target's features and its embeddings differ in size: root mean squares of 1.9 and 0.11 in SmolLM2-135M, of
6 and 0.017 in Qwen2.5-0.5B. A step of Muon or Adam moves every weight about as far, so weights that have to become
large, as those that read an embedding of 0.017, hardly move, and the draft does not hear which token came. In
units of what they read and write all weights are of like size. The draft itself knows nothing of this:
`folded` puts the units into its weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from frspec_jax.drafters.eagle import EagleParams
from train.batches import Packing

FIT_PAIRS = 1 << 18  # pairs that a fit looks at, at most: enough for twice 4,096 unknowns an output
RIDGE = 1e-2  # of the mean square of each input: what few pairs cannot tell stays near zero


@dataclasses.dataclass(frozen=True)
class Units:
    """What counts as one in a feature and in an embedding. Powers of two, so that folding them in rounds nothing."""

    feature: float = 1.0
    embedding: float = 1.0

    @classmethod
    def measured(cls, packing: Packing, embedding: np.ndarray) -> Units:
        """The root mean squares over all pairs of one batch, counted or not, to the nearest power of two."""
        batch = next(packing.training(0))
        real = np.asarray(batch.segment) > 0
        sizes = (np.asarray(batch.features)[real], embedding[np.asarray(batch.next_tokens)[real]])
        return cls(*(2.0 ** round(math.log2(math.sqrt(np.square(x, dtype=np.float64).mean()) + 1e-30)) for x in sizes))


ONE = Units()


def folded(params: EagleParams, units: Units) -> EagleParams:
    """The draft of weights in `units`: what reads a feature is divided by its unit, what writes one multiplied.

    The norm before the MLP takes the unit out by itself.
    """
    hidden, unit = params.fc.shape[0], units.feature
    column = jnp.where(jnp.arange(2 * hidden) < hidden, unit / units.embedding, 1.0).astype(params.fc.dtype)
    layer = params.layer

    def written(bias: Array | None) -> Array | None:
        return None if bias is None else bias * unit

    return dataclasses.replace(
        params,
        fc=params.fc * column,
        fc_bias=written(params.fc_bias),
        layer=dataclasses.replace(
            layer,
            qkv=layer.qkv / unit,
            output=layer.output * unit,
            output_bias=written(layer.output_bias),
            down=layer.down * unit,
            down_bias=written(layer.down_bias),
        ),
    )


def unfolded(params: EagleParams, units: Units) -> EagleParams:
    """The weights in `units` of a draft: the inverse of `folded`."""
    return folded(params, Units(1 / units.feature, 1 / units.embedding))


def fitted(params: EagleParams, packing: Packing, embedding: np.ndarray, units: Units) -> EagleParams:
    """`params` as the linear draft that fits best: fc by least squares, and a layer that adds nothing yet.

    A target's next feature is to a good part a linear function of the last one and of the token between them. The
    layer keeps its weights where it reads; those that write to the residual stream start at zero.

    Args:
      params: in `units`. packing: whose first training pairs, `FIT_PAIRS` at most, are fitted. embedding: [V, H].
    """
    hidden = params.fc.shape[0]
    squares, products = np.zeros((2 * hidden, 2 * hidden)), np.zeros((2 * hidden, hidden))
    batches = min(packing.steps_per_epoch, -(-FIT_PAIRS // (packing.rows * packing.row)))
    for batch in itertools.islice(packing.training(0), batches):
        counted = np.asarray(batch.mask) > 0
        read = np.concatenate(
            [
                embedding[np.asarray(batch.next_tokens)[counted]] / units.embedding,
                np.asarray(batch.features)[counted] / units.feature,
            ],
            axis=1,
        )
        squares += read.T @ read
        products += read.T @ (np.asarray(batch.targets)[counted] / units.feature)
    np.fill_diagonal(squares, np.diag(squares) * (1 + RIDGE) + 1e-6)
    fc = np.linalg.solve(squares, products).T
    layer = dataclasses.replace(
        params.layer, output=jnp.zeros_like(params.layer.output), down=jnp.zeros_like(params.layer.down)
    )
    return dataclasses.replace(params, fc=jnp.asarray(fc, params.fc.dtype), layer=layer)
