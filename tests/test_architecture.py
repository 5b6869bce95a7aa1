"""The layers of the code: imports go downward only, and what is optional is never imported by the way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {
        "errors",
        "heap",
        "plain",
        "progress",
        "readable",
        "version",
        "wire",
        "blocks",
        "symbols",
        "moments",
        "least_squares",
    },
    {"typed", "axes", "cache", "inference", "runtime", "shelf", "signature"},
    {"external", "feeds", "footprint", "twin"},
    {"store", "bench", "calibration"},
    {"graph", "decisions"},
    {"rules", "metrics"},
    {"shapes"},
    {"coupling"},
    {"cost", "exactness", "sites"},
    {"groups", "executors"},
    {"consumers"},
    {"interpreter"},
    {"gradients", "measured"},
    {"evidence", "plan"},
    {"criteria", "removal"},
    {"budget", "rewrite", "unsigned"},
    {"compensate", "latency", "methods", "options", "verify"},
    {"stitch"},
    {"sensitivity"},
    {"study"},
    {"schedule"},
    {"closed_loop"},
    {"finish"},
    {"prepare"},
    {"frontier"},
    {"pipeline", "train"},
    {"edge", "implant", "explain", "export", "folder"},
    {"report"},
    {"jobs"},
    {"cli"},
    {"__main__"},
)
"""Lowest first; a module imports lower layers, and others of its own package. `spa/__init__.py` is above them all."""
LEVEL = {name: k for k, layer in enumerate(LAYERS) for name in layer}
FRAMEWORKS = {
    "torch",
    "transformers",
    "tensorflow",
    "keras",
    "tf2onnx",
    "jax",
    "jax2onnx",
    "flax",
    "paddle",
    "paddle2onnx",
}
OPTIONAL = {
    *FRAMEWORKS,
    "onnx_graphsurgeon",
    "networkx",
    "typer",
    "rich",
    "grpc",
    "sklearn",
    "hypothesis",
    "PIL",
    "tokenizers",
    "yaml",
    "spa_server",
    "sqlalchemy",
}
LIMIT = 500


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def component(path: Path) -> str:
    """`criteria` for spa/criteria/base.py, `plan` for spa/plan.py."""
    part = path.relative_to(ROOT / "spa").parts[0]
    return part.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """All modules that a file imports anywhere, with dots; `from spa import x` counts as `spa.x`."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            out.update(f"spa.{alias.name}" for alias in node.names) if module == "spa" else out.add(module)
    return out


def test_every_module_has_a_layer() -> None:
    found = {component(path) for path in sources("spa")} - {"__init__"}
    assert found == set(LEVEL)


@pytest.mark.parametrize(
    "path", [p for p in sources("spa") if p != ROOT / "spa" / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_downward(path: Path) -> None:
    mine = component(path)
    for module in imported(path) - {"spa"}:
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package == "spa" and (other in LEVEL or mine != "cli"):  # the command line also uses the package's own names
            assert other == mine or LEVEL[other] < LEVEL[mine], f"spa/{mine} imports spa/{other}"


def test_the_solver_knows_no_onnx() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "numpy.typing", "spa.symbols"}
    for name in ("axes", "symbols"):
        assert {m for m in imported(ROOT / "spa" / f"{name}.py") if m.split(".")[0] not in allowed} <= allowed


def test_tests_and_server_are_never_imported() -> None:
    for path in sources("spa"):
        assert not {m.split(".")[0] for m in imported(path)} & {"tests", "server", "benchmarks", "examples"}, path


def test_drivers_import_nothing_but_themselves() -> None:
    """Exports run in the Python that has the framework, which has neither the other parts of spa nor their packages; a
    framework itself is imported by name, once it is needed."""
    drivers = ROOT / "spa/export/drivers"
    allowed = {"spa.errors", "spa.export.request"} | {
        f"spa.export.drivers.{p.stem}" for p in sources("spa/export/drivers")
    }
    mine = [*sources("spa/export/drivers"), ROOT / "spa/export/worker.py", ROOT / "spa/export/request.py"]
    for path in [*mine, ROOT / "spa/errors.py"]:
        found = {m for m in imported(path) if m.partition(".")[0] not in sys.stdlib_module_names}
        assert found <= allowed | {"numpy", "numpy.typing"}, path
    for path in sources("spa"):  # and they are asked through a process
        if drivers not in path.parents and path.name != "worker.py":
            assert not any(m.startswith("spa.export.drivers") for m in imported(path)), path


def test_the_server_is_only_known_to_its_commands() -> None:
    """And there inside of functions: without the packages of the server all other commands work."""
    for path in sources("spa"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert component(path) == "cli" or not any(m.startswith("spa_server") for m in imported(path)), path
        for node in tree.body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not any(name.startswith("spa_server") for name in names), path


PRUNE = """
import sys
import spa
light = {"onnx", "numpy", "onnxruntime", "onnx_ir"} & set(sys.modules)
assert not light, light
spa.prune(sys.argv[1], target="macs=0.7", output=sys.argv[2])
spa.analyze(sys.argv[2])
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_pruning_needs_no_extras(tmp_path: Path) -> None:
    """`import spa` is light, and pruning a file imports none of the optional packages."""
    import onnx

    from tests.models import BUILT

    onnx.save(BUILT["residual_cnn"].build(), tmp_path / "in.onnx")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRUNE, str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert not OPTIONAL & set(done.stdout.split())


@pytest.mark.parametrize("path", [*sources("spa"), *sources("tests")], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LIMIT, f"{lines} lines: split it"


def test_public_names_exist() -> None:
    import spa

    assert sorted(spa.__all__, key=str.lower) == sorted(set(spa.__all__), key=str.lower)
    for name in spa.__all__:
        assert getattr(spa, name) is not None
