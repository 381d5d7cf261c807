"""Token rankings, and the sub-vocabulary that the draft's head keeps."""
from flax import struct
from jax import Array


@struct.dataclass
class DraftHead:
    """The rows of the target's LM head that the draft keeps, and the ids that they stand for."""

    weight: Array  # [V', H]
    ids: Array  # [V'] int32, unique full-vocabulary ids
