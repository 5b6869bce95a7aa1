"""The recorded models, where there are any: `SPA_DATA`, or a folder `shared` beside the checkout."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(os.environ.get("SPA_DATA") or Path(__file__).parents[2] / "shared")
MISSING = f"no recorded models in {ROOT}; set SPA_DATA to their folder"


@dataclass(frozen=True)
class Recorded:
    """One model file."""

    name: str
    path: Path
    status: str
    """As its manifest has it: `ok`, `ort-fail` ..."""


def recorded() -> list[Recorded]:
    """Every model of the manifest; none without the folder."""
    manifest = ROOT / "zoo" / "manifest.json"
    if not manifest.is_file():
        return []
    entries = json.loads(manifest.read_text(encoding="utf-8"))["models"]
    return [Recorded(e["name"], manifest.parent / e["file"], e["status"]) for e in entries]


def trained() -> list[Recorded]:
    """Models with real weights."""
    folder = ROOT / "data" / "models"
    return [Recorded(p.stem, p, "ok") for p in sorted(folder.rglob("*.onnx"))]
