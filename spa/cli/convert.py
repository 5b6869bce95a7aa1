"""spa convert: a framework's model to a pruned ONNX file: export, prune and verify in one go."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from spa.cli import output
from spa.cli.export import export, show
from spa.cli.options import check_output, read_dims
from spa.cli.prune import MORE, More, prune
from spa.errors import UsageError

if TYPE_CHECKING:
    from spa.export.run import Exported

Dense: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--dense",
        metavar="FILE",
        help="Keep the exported model before pruning, for `spa verify`, `spa bench` and teachers.",
        show_default=False,
    ),
]
_EXPORT_ONLY = ("model_inputs", "exporter", "opset", "static_batch", "python")
"""Options of `spa export` that are not of `spa prune`, too."""


def convert(**options: Any) -> None:
    """Export a framework's model, prune it until it meets its targets, verify, compensate, and write it."""
    source, dense = options.pop("source"), options.pop("dense")
    exporting = {name: options.pop(name) for name in _EXPORT_ONLY}
    if source.endswith(".onnx") or is_exported(Path(source)):
        if dense is not None or exporting != _DEFAULTS:
            raise UsageError(f"{source}: is ONNX already: leave out --dense and the options of the export")
        prune(model=Path(source), **options)
        return
    if dense is None and (options["plan"] is not None or options["report"] is not None):
        raise UsageError("--plan and --report are about the exported model: keep it with --dense FILE")
    if dense is not None:
        check_output(dense, options["out"])
    with _exported(source, dense, exporting, options) as (model, made):
        options["context"].meta[MORE] = More(made.to_json(), dense is not None)
        prune(model=model, **options)


def is_exported(place: Path) -> bool:
    """Whether this is a folder in which somebody has exported a model already."""
    from spa.folder import is_folder

    return is_folder(place) and not any(place.glob("*.safetensors"))


@contextmanager
def _exported(
    source: str, dense: Path | None, exporting: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[tuple[Path, Exported]]:
    from spa.budget.targets import parse_request
    from spa.export.run import export as run
    from spa.options import check_output as check_place

    check_place(options["out"])  # before the export, which takes longest
    parse_request(options["target"])
    with tempfile.TemporaryDirectory(prefix="spa-convert-") as folder:
        with output.stages(quiet=options["json"]) as progress:
            made = run(
                source,
                dense or Path(folder) / "exported.onnx",
                inputs=exporting["model_inputs"] or (),
                exporter=exporting["exporter"],
                opset=exporting["opset"],
                static_batch=exporting["static_batch"],
                python=exporting["python"],
                dims=read_dims(options["dim"]),
                seed=options["seed"],
                check=not options["no_verify"],
                printed=sys.stderr.write if options["verbose"] else None,
                progress=progress,
            )
        if not options["json"]:
            show(made, kept=dense is not None)
        yield made.output, made


def _parameters(command: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """Arguments of a command, with annotations that are no text."""
    hints = get_type_hints(command, include_extras=True)
    return {n: p.replace(annotation=hints[n]) for n, p in inspect.signature(command).parameters.items()}


def _joined() -> inspect.Signature:
    """What to export, how, and everything that `spa prune` takes but its model."""
    ours, theirs = _parameters(export), _parameters(prune)
    del theirs["model"]
    kept = inspect.Parameter("dense", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Dense)
    found = [theirs.pop("context"), ours["source"], theirs.pop("out"), theirs.pop("target")]
    found += [*(ours[name] for name in _EXPORT_ONLY), kept, *theirs.values()]
    return inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found])


_SIGNATURE = _joined()
_DEFAULTS = {name: _SIGNATURE.parameters[name].default for name in _EXPORT_ONLY}
# typer reads a command's options from its signature
convert.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # functions may have one
convert.__annotations__ = {name: p.annotation for name, p in _SIGNATURE.parameters.items()}
