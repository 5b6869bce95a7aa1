"""Operators of ONNX's default domain that have no rule, and why: what they touch is frozen, and the reason is told."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REASONS"]

_TABLE = {
    "makes numbers from sizes and reads no weights": (
        "AffineGrid BlackmanWindow HammingWindow HannWindow MelWeightMatrix RandomNormal RandomUniform"
    ),
    "draws random numbers, so that no result can be compared": (
        "Bernoulli Multinomial RandomNormalLike RandomUniformLike"
    ),
    "a transform along whole axes: every position reaches every other": "DFT STFT",
    "the size of its result depends on the data": "NonMaxSuppression NonZero Unique",
    "its indices are positions in another tensor": "MaxUnpool",
    "handles whole tensors, whose axes are not followed through sequences and optional values": (
        "ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty "
        "SequenceErase SequenceInsert SequenceLength SequenceMap SplitToSequence"
    ),
    "works on text or files": ("ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer"),
    "a loss: it belongs to training graphs": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "newer than the runtimes that results are verified with": "CausalConvWithState LinearAttention SwiGLU",
}

REASONS: Mapping[str, str] = {name: reason for reason, names in _TABLE.items() for name in names.split()}
"""Operator -> reason."""
