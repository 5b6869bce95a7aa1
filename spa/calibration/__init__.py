"""Calibration data: samples from files, folders, text and Python, or made up from the model alone."""

from spa.calibration.data import Calibration
from spa.calibration.load import FORMS, load_calibration
from spa.calibration.preprocess import PRESETS, Preprocessing

__all__ = ["FORMS", "PRESETS", "Calibration", "Preprocessing", "load_calibration"]
