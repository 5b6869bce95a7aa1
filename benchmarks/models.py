"""The models the benchmarks run on: random seeded weights, no downloads.

    python benchmarks/models.py [NAME ...] [--cache FOLDER]

Those of `networks.py` are exported by `torch.onnx.export`, those of `decoders.py` are written as they are. Files are
kept, see `paths.py`. `spa` is never imported, so that the tools it is compared with can use this in an environment of
their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from decoders import DECODERS, write_decoder
from networks import MODULES, export
from paths import cache, data_of, path_of, size_of


def build(name: str) -> Path:
    """Make a model unless it is there: a name of `MODULES` (with `-dynamo` for the other exporter) or of `DECODERS`."""
    path = path_of(name)
    if path.exists():
        return path
    draft = path.with_suffix(".draft.onnx")
    if name in DECODERS:  # the data file's name is part of the model
        for old in data_of(path):
            old.unlink()
        folder = Path(tempfile.mkdtemp(dir=cache()))
        write_decoder(folder / path.name, DECODERS[name])
        for part in sorted(folder.iterdir(), reverse=True):  # the model last: with it everything is there
            os.replace(part, path.with_name(part.name))
        folder.rmdir()
        return path
    if name == "decoder-1gb-single":
        _inline(build("decoder-1gb"), draft)
    else:
        export(name.removesuffix("-dynamo"), draft, name.endswith("-dynamo"))
    os.replace(draft, path)
    return path


def _inline(source: Path, target: Path) -> None:
    """The same model with its weights inside."""
    import onnx

    onnx.save(onnx.load(str(source)), str(target))


def needs(name: str) -> Sequence[str]:
    """Packages that building a model takes."""
    if name in DECODERS or name == "decoder-1gb-single":
        return ("onnx",)
    exporter = ("onnxscript",) if name.endswith("-dynamo") else ()
    return ("torch", "onnx", *exporter, *(("transformers",) if "-hf" in name else ()))


NAMES = (
    *MODULES,
    "resnet50-dynamo",
    "vit-b16-dynamo",
    "bert-base-dynamo",
    *DECODERS,
    "decoder-1gb-single",
)
"""Everything `build` can make."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    if options.cache:
        os.environ["SPA_BENCH_CACHE"] = str(options.cache)
    for name in options.names or NAMES:
        try:
            path = build(name)
        except ImportError as error:
            print(f"{name:20} skipped: {error}", flush=True)
            continue
        disk = sum(part.stat().st_blocks * 512 for part in (path, *data_of(path)))
        size = size_of(path)
        print(f"{name:20} {size / 1e6:10,.1f} MB ({disk / 1e6:,.1f} MB on disk)  {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
