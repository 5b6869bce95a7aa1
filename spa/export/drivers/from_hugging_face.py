"""A folder with `config.json` and safetensors, as `save_pretrained` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from spa.errors import ModelError, UnsupportedModelError, UsageError
from spa.export.drivers.base import first_line, made_up, need, versions
from spa.export.drivers.from_torch import TorchSource
from spa.export.request import BATCH, Input, Request

_SEQUENCE = "sequence"


def open_source(request: Request) -> HuggingFace:
    """The model of a folder, with inputs as its kind of model takes them.

    Raises:
        UsageError: transformers is missing, or the inputs are not known.
        ModelError: the folder cannot be read.
        UnsupportedModelError: its weights are Python objects, or its code would have to be executed.
    """
    folder = Path(request.source)
    transformers = need("transformers")
    need("torch")
    try:
        body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read ({first_line(error)}); save the model again") from error
    if "auto_map" in body:
        raise UnsupportedModelError(
            "brings Python code of its own (auto_map in config.json), which is not executed; write a function that "
            "loads it, and export torch:package.module:function"
        )
    model = _loaded(transformers, body, folder)
    inputs = request.inputs or _inputs(model)
    return HuggingFace(
        model, made_up(inputs, request.seed), Request(**{**vars(request), "inputs": inputs}), keywords=True
    )


def _loaded(transformers: Any, body: dict[str, Any], folder: Path) -> Any:
    names = body.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "attn_implementation": "eager"}
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        config.use_cache = False  # the graph has no cache: its inputs and outputs would be the cache's tensors
        config._experts_implementation = "batched_mm"  # the only one whose graph is right for any number of tokens
        load = partial(
            (kind or transformers.AutoModel).from_pretrained, str(folder), output_loading_info=True, **options
        )
        model, said = load(config=config)
        if _missing(said) and all("pooler." in name for name in _missing(said)):
            model, said = load(config=config, add_pooling_layer=False)  # saved without one
    except Exception as error:  # transformers raises anything
        raise ModelError(
            f"cannot be loaded by transformers ({first_line(error)}); save it again with save_pretrained"
        ) from error
    if missing := _missing(said):  # transformers would make them up
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"has no weights for {missing[0]}{more}; save the model of the kind that config.json names")
    return model.eval()


def _missing(said: Mapping[str, Any]) -> list[str]:
    return sorted(said["missing_keys"])


def _inputs(model: Any) -> tuple[Input, ...]:
    """Inputs by the kind of model: texts, images, both ends of a translation."""
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    text = (BATCH, _SEQUENCE)
    if main == "input_ids":
        found = [Input("input_ids", text, "int64"), Input("attention_mask", text, "int64")]
        if getattr(config, "is_encoder_decoder", False):
            found.append(Input("decoder_input_ids", (BATCH, "target_sequence"), "int64"))
        return tuple(found)
    if main == "pixel_values" and isinstance(getattr(config, "image_size", None), (int, list, tuple)):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return (Input("pixel_values", (BATCH, getattr(config, "num_channels", 3), height, width)),)
    raise UsageError(
        f"its inputs ({main} ...) are not known here: give --input NAME=SIZES for each, such as {main}=1x3x224x224"
    )


class HuggingFace(TorchSource):
    """A model of transformers: inputs go by name."""

    def export(self, path: Path) -> None:
        """By torch's exporter; see `TorchSource.export`."""
        super().export(path)
        self.exporter += f", {versions('transformers')}"
