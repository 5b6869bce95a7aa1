"""ONNX models as differentiable torch modules: gradients and training without the model's source code.

    network = Interpreter(spa.load("model.onnx"))
    loss = network({"image": images})["logits"].logsumexp(1).mean()
    loss.backward()

Needs the extra `torch`; everything else in `spa` works without it.
"""

from __future__ import annotations

from spa.errors import UsageError

try:
    import torch  # noqa: F401  (what follows needs it: absent, it is one clear sentence)
except (ImportError, OSError) as error:
    raise UsageError(
        "Gradients need torch, which is not installed or damaged: pip install 'spa-prune[torch]'."
    ) from error

from spa.interpreter.base import Unsupported, table
from spa.interpreter.gates import Gates
from spa.interpreter.losses import CausalLM, CrossEntropy, Distance, GraphLoss, Loss, SampledLabels, SquaredError
from spa.interpreter.module import Interpreter, Support, supported
from spa.interpreter.untie import untie, untie_if_merged

__all__ = [
    "CausalLM",
    "CrossEntropy",
    "Distance",
    "Gates",
    "GraphLoss",
    "Interpreter",
    "Loss",
    "SampledLabels",
    "SquaredError",
    "Support",
    "Unsupported",
    "supported",
    "table",
    "untie",
    "untie_if_merged",
]
