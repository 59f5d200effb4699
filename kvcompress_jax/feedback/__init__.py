"""Keys rounded with error feedback: less divergence from the same codes.

`code` rounds, `fit` finds from the queries of a model how. Nothing here reads or runs a model
(`kvcompress_jax.models.probe` does), and nothing that reads a page needs to know.
"""

from kvcompress_jax.feedback.code import (
    HEAD_AXIS,
    RANK,
    KeyFeedback,
    PageFeedback,
    at_position,
    block_pairs,
    encode_with_feedback,
)
from kvcompress_jax.feedback.fit import fit_feedback

__all__ = [
    "HEAD_AXIS",
    "RANK",
    "KeyFeedback",
    "PageFeedback",
    "at_position",
    "block_pairs",
    "encode_with_feedback",
    "fit_feedback",
]
