"""An MLP in scikit-learn. `python sklearn_models.py FOLDER EPOCHS` trains it and writes ONNX with skl2onnx."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from sklearn.neural_network import MLPClassifier


def main(folder: Path, epochs: int) -> None:
    """Train it and write it."""
    digits = np.load(folder / "digits.npz")
    images = digits["images"].reshape(-1, 64)
    network = MLPClassifier((32, 24), max_iter=epochs, random_state=0, learning_rate_init=5e-3, tol=0)
    network.fit(images, digits["labels"])
    options = {id(network): {"zipmap": False}}  # probabilities as one tensor, not as a list of dictionaries
    proto = to_onnx(network, images[:1], options=options, target_opset=17)
    (folder / "mlp-source.onnx").write_bytes(proto.SerializeToString())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
