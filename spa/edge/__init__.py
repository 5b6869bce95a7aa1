"""From a pruned model to what a device runs: INT8, float16, older opsets and `.ort`, each stage measured and gated.

from spa.edge import Data, convert, run
convert("quantize", "small.onnx", output="int8.onnx", data=Data("calib.npz"), gate={"agreement": 0.98})
outcome = run("recipe.yaml")
"""

from spa.edge.base import Step, require
from spa.edge.convert import CONVERSIONS, Data, convert
from spa.edge.fidelity import Fidelity
from spa.edge.gates import GATES, Check
from spa.edge.recipe import Recipe, read_recipe
from spa.edge.run import Outcome, run

__all__ = [
    "CONVERSIONS",
    "GATES",
    "Check",
    "Data",
    "Fidelity",
    "Outcome",
    "Recipe",
    "Step",
    "convert",
    "read_recipe",
    "require",
    "run",
]
