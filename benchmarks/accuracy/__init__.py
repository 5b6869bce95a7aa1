"""Accuracy of training-free pruning on trained networks, next to Torch-Pruning: `python -m benchmarks.accuracy`."""
