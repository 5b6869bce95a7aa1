"""spa quantize, spa float16, spa opset and spa ort: one stage on the way to a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spa.cli.edge import Compared, Gates, single
from spa.cli.options import (
    Batch,
    Dims,
    Json,
    MaxLength,
    Model,
    Output,
    Preprocess,
    Samples,
    Seed,
    Tokenizer,
    Verbose,
    read_dims,
    read_list,
)

Provider = Annotated[Literal["cpu", "cuda", "auto"], typer.Option("--provider", help="Where outputs are compared.")]


def quantize(
    model: Model,
    out: Output,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="PATH|none|noise|bn",
            help="Samples on which ranges are measured and outputs compared: .npz, images, .jsonl or .txt.",
            show_default=False,
        ),
    ],
    platform: Annotated[
        Literal["auto", "x86", "x86-vnni", "arm", "gpu"],
        typer.Option(help="Whose integer kernels the types are for; auto: this machine's."),
    ] = "auto",
    method: Annotated[
        Literal["minmax", "entropy", "percentile"], typer.Option(help="How ranges of activations are set.")
    ] = "minmax",
    per_channel: Annotated[
        bool, typer.Option("--per-channel/--per-tensor", help="A scale per output channel of weights, or one for all.")
    ] = True,
    ops: Annotated[
        Literal["auto", "linear", "all"],
        typer.Option(help="Products with weights, everything possible, or what suits the kind of model."),
    ] = "auto",
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave nodes alone whose name or type matches; repeatable."),
    ] = None,
    no_search: Annotated[
        bool, typer.Option("--no-search", help="Do not look for nodes to leave alone where a gate is missed.")
    ] = False,
    gate: Gates = None,
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    dim: Dims = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantise a model to INT8 with ONNX Runtime's static quantiser (QDQ), and compare it with what it was."""
    from spa.edge import Data

    data = Data(calibration, samples, preprocess, tokenizer, max_length, read_dims(dim), seed, batch, provider)
    single(
        "quantize",
        model,
        out,
        data,
        gate,
        json,
        platform=platform,
        method=method,
        per_channel=per_channel,
        ops=ops,
        exclude=read_list(exclude),
        search=not no_search,
    )


def float16(
    model: Model,
    out: Output,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Nodes whose name or type matches stay in float32; repeatable."),
    ] = None,
    half_io: Annotated[bool, typer.Option("--half-io", help="Inputs and outputs become float16, too.")] = False,
    gate: Gates = None,
    calibration: Compared = "noise",
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    dim: Dims = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a model to float16; inputs and outputs stay float32."""
    from spa.edge import Data

    data = Data(calibration, samples, preprocess, tokenizer, max_length, read_dims(dim), seed, batch, provider)
    single("float16", model, out, data, gate, json, keep=read_list(keep), half_io=half_io)


def opset(
    model: Model,
    out: Output,
    version: Annotated[int, typer.Option("--to", metavar="N", help="Opset, such as 13.", show_default=False)],
    gate: Gates = None,
    calibration: Compared = "noise",
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    dim: Dims = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a model to another opset, for a runtime that stops early; the IR version goes down with it."""
    from spa.edge import Data

    data = Data(calibration, samples, preprocess, tokenizer, max_length, read_dims(dim), seed, batch, provider)
    single("opset", model, out, data, gate, json, version=version)


def ort(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.ort", help="File to write.", show_default=False)],
    style: Annotated[
        Literal["fixed", "runtime"],
        typer.Option(help="Optimise now, or leave some of it to the device (NNAPI, CoreML)."),
    ] = "fixed",
    platform: Annotated[
        Literal["any", "arm", "amd64"], typer.Option(help="Allow what only this kind of processor runs.")
    ] = "any",
    gate: Gates = None,
    calibration: Compared = "noise",
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    provider: Provider = "cpu",
    seed: Seed = 0,
    dim: Dims = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a model in ONNX Runtime's own format (.ort), and the list of operators that a minimal build needs."""
    from spa.edge import Data

    data = Data(calibration, samples, preprocess, tokenizer, max_length, read_dims(dim), seed, batch, provider)
    single("ort", model, out, data, gate, json, style=style, platform=platform)
