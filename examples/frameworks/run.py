"""Train the same networks in every framework, export and prune each with the same command, and compare.

    python examples/frameworks/run.py            # all: installs some gigabytes, takes some minutes
    python examples/frameworks/run.py jax keras  # only these

Every framework gets an environment of its own, since they do not agree on the versions of other packages. Only the
framework is in there: `spa` runs in the Python that runs this script, and asks the other one with `--python`.
Everything is written to examples/out/frameworks/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "frameworks"
EPOCHS = 40
TARGET = "macs=0.6"
OPTIONS = ("--target", TARGET, "--method", "obspa", "--samples", "256", "--seed", "0")


@dataclass(frozen=True)
class Framework:
    """One row of the table."""

    environment: str
    """Which packages it needs: requirements/NAME.txt, and NAME_models.py trains."""
    sources: Mapping[str, str]
    """What `spa convert` is given, by network; files are looked for where the training wrote them."""
    shape: tuple[int, ...] = (1, 8, 8)
    """Of one image."""
    input: str = "image"
    """Name of the input."""
    options: tuple[str, ...] = ()


_BOTH = ("cnn", "transformer")
FRAMEWORKS = {
    "torch-dynamo": Framework("torch", {n: f"torch:torch_models:{n}" for n in _BOTH}, options=("--exporter", "dynamo")),
    "torch-torchscript": Framework(
        "torch", {n: f"torch:torch_models:{n}" for n in _BOTH}, options=("--exporter", "torchscript")
    ),
    "keras": Framework("keras", {"cnn": "cnn.keras", "transformer": "keras:keras_models:trained"}, (8, 8, 1)),
    "tensorflow": Framework("keras", {n: f"{n}-saved" for n in _BOTH}, (8, 8, 1)),
    "jax": Framework("jax", {n: f"jax:jax_models:{n}" for n in _BOTH}, (8, 8, 1)),
    "paddle": Framework("paddle", {n: f"{n}-inference" for n in _BOTH}),
    "sklearn": Framework("sklearn", {"mlp": "mlp-source.onnx"}, (64,), "X"),
}


def digits() -> dict[str, np.ndarray]:
    """Training and test images, never mixed."""
    found = load_digits()
    images = (found.images / 8 - 1).astype(np.float32)
    split = train_test_split(images, found.target, test_size=0.25, random_state=0, stratify=found.target)
    return dict(zip(("images", "test_images", "labels", "test_labels"), split, strict=True))


def python_of(name: str, environments: Path) -> Path:
    """The Python of an environment, made if it is missing or its requirements have changed."""
    folder, wanted = environments / name, HERE / "requirements" / f"{name}.txt"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, digest = folder / "installed", hashlib.sha256(wanted.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != digest:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
        stamp.write_text(digest)
    return python


def shaped(images: np.ndarray, model: Path) -> dict[str, np.ndarray]:
    """Images in the layout of a model's input, by its name."""
    (spec,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()
    return {spec.name: images.reshape(len(images), *spec.shape[1:])}


def accuracy(model: Path, data: Mapping[str, np.ndarray]) -> float:
    """Share of the test images that a model classifies correctly."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores = session.run(None, shaped(data["test_images"], model))[-1]
    return float((scores.argmax(1) == data["test_labels"]).mean())


def fixture(model: Path, place: Path) -> None:
    """A copy without what can be inferred again: shapes inside, notes of the exporter."""
    proto = onnx.load(model)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.save(proto, place)


def train(name: str, python: Path, folder: Path, data: Mapping[str, np.ndarray], epochs: int) -> None:
    """Train the networks of an environment, unless that was done with this script and data before."""
    script = HERE / f"{name}_models.py"
    digest = hashlib.sha256(script.read_bytes() + str(epochs).encode()).hexdigest()
    stamp = folder / "trained"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "digits.npz", **data)
    subprocess.run([python, script, folder, str(epochs)], check=True)
    stamp.write_text(digest)


def convert(framework: Framework, network: str, python: Path, folder: Path, out: Path, data: Any) -> dict[str, Any]:
    """`spa convert`, by its command line; returns its JSON with accuracies and groups."""
    source = framework.sources[network]
    calibration = out / f"{network}-calibration.npz"
    dense, pruned = out / f"{network}.onnx", out / f"{network}-pruned.onnx"
    out.mkdir(parents=True, exist_ok=True)
    np.savez(calibration, **{framework.input: data["images"].reshape(-1, *framework.shape)})
    command = [sys.executable, "-m", "spa"]
    files = source if ":" in source else str(folder / source)
    env = {**os.environ, "FRAMEWORKS_FOLDER": str(folder)}
    prune = [*command, "convert", files, "-o", str(pruned), *OPTIONS, "--calibration", str(calibration), "--json"]
    if source.endswith(".onnx"):  # no export is needed
        dense = folder / source
    else:
        prune += ["--python", str(python), "--dense", str(dense), *framework.options]
    done = subprocess.run(prune, check=False, env=env, cwd=HERE, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(prune)}: failed")
    body = json.loads(done.stdout)
    found = subprocess.run([*command, "inspect", str(dense), "--json"], check=True, capture_output=True, text=True)
    groups = sorted((g["kind"], g["units"]) for g in json.loads(found.stdout)["groups"])
    return {
        **body,
        "groups_found": groups,
        "dense_model": str(dense),
        "dense": accuracy(dense, data),
        "pruned": accuracy(pruned, data),
    }


def main() -> int:
    """Everything, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FRAMEWORKS)}")
    parser.add_argument("--environments", type=Path, default=OUT / "environments", help="where they are made")
    parser.add_argument("--fixtures", type=Path, help="folder for small copies of the dense models")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in FRAMEWORKS:
            parser.error(f"no framework is called {name}; choose of {', '.join(FRAMEWORKS)}")
    console, data = Console(width=None if sys.stdout.isatty() else 150), digits()
    table = Table(title=f"spa convert ... {' '.join(OPTIONS)}", title_justify="left")
    for heading in ("framework", "network", "parameters", "MACs", "groups", "accuracy", "pruned", "proof"):
        table.add_column(heading, justify="left" if heading in ("framework", "network", "groups") else "right")
    for name in arguments.names or FRAMEWORKS:
        framework = FRAMEWORKS[name]
        python = python_of(framework.environment, arguments.environments)
        folder = OUT / "trained" / framework.environment
        train(framework.environment, python, folder, data, arguments.epochs)
        for network in framework.sources:
            body = convert(framework, network, python, folder, OUT / name, data)
            if arguments.fixtures is not None:
                fixture(Path(body["dense_model"]), arguments.fixtures / f"{name}_{network}.onnx")
            table.add_row(
                name,
                network,
                f"{body['parameters']['before']:,} -> {body['parameters']['after']:,}",
                f"{body['macs']['after'] / body['macs']['before']:.0%}",
                ", ".join(f"{kind} {units}" for kind, units in body["groups_found"]),
                f"{body['dense']:.1%}",
                f"{body['pruned']:.1%}",
                f"{body['verify']['max_rel_error']:.0e}",
            )
            console.print(f"{name}: {network} done")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
