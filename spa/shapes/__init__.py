"""Symbolic shapes and small values of every value of a model."""

from spa.shapes.infer import Shapes, infer
from spa.shapes.op import Shape

__all__ = ["Shape", "Shapes", "infer"]
