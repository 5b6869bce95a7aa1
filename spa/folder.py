"""A model with its `config.json` in one folder, as optimum, Olive and `transformers.onnx` write it: pruned as a whole.

The config is changed where it can say what pruning did, and it is told what it cannot say. The rest of the folder is
copied as it is (tokenizer, image processor, labels).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from spa.errors import ModelError, OutputError, UsageError
from spa.finish import Result
from spa.plan import GroupRecord
from spa.prepare import analyze
from spa.signature import as_ir

__all__ = ["ConfigChange", "Folder", "changed_config", "is_folder"]

CONFIG = "config.json"
MODEL = "model.onnx"

_SIZES: Mapping[str, str] = {
    # what a config calls the neurons of an MLP's hidden layer, by Hugging Face's kinds of models
    "intermediate_size": "neuron",
    "ffn_dim": "neuron",
    "d_ff": "neuron",
    "n_inner": "neuron",
    "hidden_dim": "neuron",
    "encoder_ffn_dim": "neuron",
    "decoder_ffn_dim": "neuron",
    "num_attention_heads": "head",
    "num_key_value_heads": "kv-head",
    "num_local_experts": "expert",
    "num_experts": "expert",
    "n_routed_experts": "expert",
    "moe_num_experts": "expert",
    "hidden_size": "hidden",
}
"""Entry of a config -> kind of the units that it counts, in every layer alike."""
_ONCE = ("hidden_size",)
"""Entries that count one group for all layers."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tf_model*", "flax_model*", "*.ort")
"""Other files with the weights before pruning."""
_DENSE = "first_k_dense_replace"
"""Entry with the number of layers that have no experts."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_BESIDE_HEADS = ("num_attention_heads", "num_key_value_heads", "hidden_size")
"""Entries that configs without `head_dim` compute a head's size from."""


@dataclass(frozen=True)
class ConfigChange:
    """What became of a config."""

    config: dict[str, Any]
    """All of it."""
    changed: dict[str, tuple[int, int]]
    """Entry -> its value before and after."""
    unsaid: tuple[str, ...]
    """What pruning did and the config cannot say, one sentence each."""


def changed_config(config: Mapping[str, Any], groups: Iterable[GroupRecord]) -> ConfigChange:
    """A config with the sizes that are left, where one number can say them for all layers.

    Args:
        config: as `config.json` has it.
        groups: all of the model, those that lost nothing included.
    """
    records = list(groups)
    layers = sum(config[name] for name in _LAYERS if isinstance(config.get(name), int))
    out, changed, unsaid = dict(config), dict[str, tuple[int, int]](), list[str]()
    said: set[str] = set()
    for entry, kind in _SIZES.items():
        size = config.get(entry)
        found = [g for g in records if g.kind == kind and g.units == size]
        count = 1 if entry in _ONCE else layers - (config.get(_DENSE) or 0) if kind == "expert" else layers
        # where other groups have this size, too, nothing is known
        if not any(g.removed for g in found) or len(found) != count:
            continue
        assert isinstance(size, int)
        said |= {g.name for g in found}
        left = sorted({g.units - len(g.removed) for g in found})
        if len(left) > 1:
            unsaid.append(
                f"{entry}: {len(found)} layers keep {left[0]} to {left[-1]} of {size}, which one number cannot say; "
                "--allocation uniform --target units=0.75 keeps them equal"
            )
        elif entry in _BESIDE_HEADS and not isinstance(config.get("head_dim"), int):
            unsaid.append(f"{entry}: {left[0]} of {size} are left, but such a config computes a head's size from it")
        else:
            out[entry], changed[entry] = left[0], (size, left[0])
    heads = config.get("num_attention_heads")
    if "num_key_value_heads" in changed and "num_attention_heads" not in changed and isinstance(heads, int):
        before, after = changed["num_key_value_heads"]
        out["num_attention_heads"] = heads // before * after  # a key-value head leaves with the queries that read it
        changed["num_attention_heads"] = (heads, out["num_attention_heads"])
    rest = [g for g in records if g.removed and g.name not in said]
    unsaid += [f"{g.name}: {g.units - len(g.removed)} of {g.units} units ({g.kind}) are left" for g in rest]
    return ConfigChange(out, changed, tuple(unsaid))


def is_folder(place: str | os.PathLike[str]) -> bool:
    """Whether this is a folder with a config and an ONNX model."""
    folder = Path(place)
    return (folder / CONFIG).is_file() and bool(_models(folder))


def _models(folder: Path) -> list[Path]:
    """Beside the config, or in a folder called onnx, as on model hubs."""
    return sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))


class Folder:
    """One run on a folder: everything is written to a new folder, or nothing is."""

    def __init__(self, source: Path, output: Path) -> None:
        """Find the model.

        Raises:
            UsageError: it is no such folder, or there are several models.
            ModelError: its config cannot be read.
            OutputError: the output is in the way.
        """
        self.source, self.output = source, output
        if not is_folder(source):
            raise UsageError(f"{source}: is a folder without {CONFIG} and an .onnx file; name a model")
        models = _models(source)
        named = [path for path in models if path.name == MODEL]
        if not named and len(models) > 1:
            names = ", ".join(path.name for path in models)
            raise UsageError(f"{source}: has several models ({names}); prune them one by one, by their files")
        self.model = named[0] if named else models[0]
        others = [path for path in models if path != self.model]
        weights = [path for pattern in _WEIGHTS for path in sorted(source.glob(pattern))]
        self._left_out = [path.relative_to(source).as_posix() for path in (*others, *weights)]
        self._data = {file for path in models for file in external_files(path)}
        try:
            self._config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{source / CONFIG}: cannot be read ({error}); export the model again") from error
        if not isinstance(self._config, dict):
            raise ModelError(f"{source / CONFIG}: is no JSON object; export the model again")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output}: exists; the pruned folder is written to a new one")
        if source.resolve() in (output.resolve(), *output.resolve().parents):
            raise UsageError(f"{output}: is inside of the input; write to another place")
        if not output.parent.is_dir():
            raise OutputError(f"{output}: the folder {str(output.parent)!r} does not exist; create it first")
        self.change: ConfigChange | None = None

    def around(self, run: Callable[..., Result]) -> Callable[..., Result]:
        """A function that takes what `run` (`spa.prune`) takes, and writes the whole folder."""

        def whole(source: object, *, output: object = None, **options: Any) -> Result:
            staging = self.output.with_name(f".{self.output.name}.{secrets.token_hex(8)}.tmp")
            try:
                pruned = staging / self.model.relative_to(self.source)
                pruned.parent.mkdir(parents=True)
                result = run(self.model, output=pruned, **options)
                self.change = changed_config(self._config, _all_groups(result, self.model, options.get("dims")))
                text = json.dumps(self.change.config, indent=2, ensure_ascii=False) + "\n"
                (staging / CONFIG).write_text(text, encoding="utf-8")
                self._copy(staging)
                if self.output.is_dir():
                    self.output.rmdir()
                os.replace(staging, self.output)
            except OSError as error:
                raise OutputError(
                    f"{self.output}: cannot be written ({error.strerror}); check permissions and free space"
                ) from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return replace(result, output=self.output / self.model.relative_to(self.source))

        return whole

    def _copy(self, staging: Path) -> None:
        """All but weights before pruning, and what was written already."""
        left = {self.source / name for name in (CONFIG, *self._left_out)} | {self.model} | self._data
        for path in sorted(self.source.rglob("*")):
            place = path.relative_to(self.source)
            if path.is_file() and path not in left and place.parts[0] != ".git":
                (staging / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, staging / place)

    def to_json(self) -> dict[str, Any]:
        """What `--json` adds."""
        assert self.change is not None
        changed = {entry: {"before": a, "after": b} for entry, (a, b) in self.change.changed.items()}
        return {
            "folder": str(self.output),
            "config": {"changed": changed, "unsaid": list(self.change.unsaid)},
            "left_out": self._left_out,
        }

    def lines(self) -> list[str]:
        """The same, for people."""
        assert self.change is not None
        out = [f"{CONFIG}: {entry} {a} -> {b}" for entry, (a, b) in self.change.changed.items()]
        if self.change.unsaid:
            out.append(f"{CONFIG} cannot say all of it, so that code cannot build this model from it:")
            out += [f"  {text}" for text in self.change.unsaid]
        out += [f"{name} was left out: it is not pruned" for name in self._left_out]
        return out


def _all_groups(result: Result, model: Path, dims: Mapping[str, int] | None) -> list[GroupRecord]:
    """Those of a plan, and those that it leaves alone."""
    analysis = result.analysis or analyze(model, dims=dims)
    pruned = {g.name: g for g in result.plan.groups}
    return [pruned.get(g.name) or GroupRecord(g.name, g.kind, g.units, (), g.exact) for g in analysis.groups]


def external_files(model: Path) -> set[Path]:
    """Files beside a model that hold its weights."""
    with contextlib.suppress(ModelError):  # one beside the model that is pruned, and is not read otherwise
        tensors = (v.const_value for graph in as_ir(model).graphs() for v in graph.initializers.values())
        return {model.parent / t.location for t in tensors if isinstance(t, ir.ExternalTensor)}
    return set()
