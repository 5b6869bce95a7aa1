"""Fine-tuning: the weights of any supported ONNX model are trained where they are, and written back into its graph.

Needs the extra `torch`; everything else in `spa` works without it.
"""

from __future__ import annotations

from spa.interpreter import Unsupported  # noqa: F401  (first: without torch it is one clear sentence)
from spa.train.module import Imported, Module, export_torch, import_weights
from spa.train.run import Result, finetune
from spa.train.settings import Settings
from spa.train.state import Epoch

__all__ = ["Epoch", "Imported", "Module", "Result", "Settings", "export_torch", "finetune", "import_weights"]
