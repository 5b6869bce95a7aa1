"""Losses that are operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.interpreter.base import Kernel, Node, operator


def _loss(node: Node, logits: bool) -> Kernel:
    reduction, ignored = str(node.attr("reduction", "mean")), node.attr("ignore_index")

    def run(x: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        scores = torch.log_softmax(x, 1) if logits else x
        index = -100 if ignored is None else int(ignored)
        loss = F.nll_loss(scores, labels.to(torch.int64), weights, ignore_index=index, reduction=reduction)
        return (loss, scores) if node.outputs > 1 else (loss,)

    return run


operator("SoftmaxCrossEntropyLoss")(lambda node: _loss(node, True))
operator("NegativeLogLikelihoodLoss")(lambda node: _loss(node, False))
