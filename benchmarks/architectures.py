"""One small model per architecture family, with random weights, exported by both exporters of torch.

    python benchmarks/architectures.py FOLDER [--exporter torchscript|dynamo] [NAME ...]

Convolutional, recurrent and graph networks are written here (`small_networks.py`, `sequence_networks.py`); transformers
are built from the configurations of the library `transformers`, which must be installed (with `torch` and `onnxscript`)
in the Python that runs this. `spa` is not needed. What cannot be exported is reported and left out:
`FOLDER/failures.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure  # noqa: F401  # makes `benchmarks` importable
from networks import module

from benchmarks import deformable, sequence_networks, small_networks
from benchmarks.torch_modules import lazy_torch

EXPORTERS = {"torchscript": "ts", "dynamo": "dy"}
"""Exporter -> how its files end."""
OPSETS = {"torchscript": 17, "dynamo": 18}


@dataclass(frozen=True)
class Family:
    """An architecture and the model that stands for it."""

    title: str
    """What it is called in the table."""
    build: Callable[[], Any]
    """The torch module."""
    inputs: Callable[[], tuple[Any, ...]]
    """Example inputs."""
    fixed: bool = False
    """All sizes are fixed in the file: the batch, too."""
    opset: int = 0
    """At least, where the exporter's own (`OPSETS`) lacks an operator."""


def _image(*size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (lazy_torch().randn(2, *size),)


def _tokens(length: int = 12, vocabulary: int = 200) -> Callable[[], tuple[Any, ...]]:
    return lambda: (lazy_torch().randint(0, vocabulary, (2, length)),)


def _masked(length: int = 12) -> Callable[[], tuple[Any, ...]]:
    """Tokens, and the mask without which `transformers` looks for packed sequences, which TorchScript cannot write."""
    return lambda: (*_tokens(length)(), lazy_torch().ones(2, length, dtype=lazy_torch().int64))


def _hf(model: str, config: str, inputs: tuple[str, ...], output: int | str = 0, **options: Any) -> Callable[[], Any]:
    """A model of `transformers` with positional inputs and one output."""

    def build() -> Any:
        import transformers

        made = getattr(transformers, config)(**options)
        for part in (made, *(getattr(made, name, None) for name in ("text_config", "vision_config"))):
            if part is not None:
                part._attn_implementation = "eager"
                part._experts_implementation = "batched_mm"
        net = getattr(transformers, model)(made)

        class Wrapper(lazy_torch().nn.Module):  # type: ignore[misc]  # torch is looked up at run time
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, *given: Any) -> Any:
                more = {"use_cache": False} if "use_cache" in inspect.signature(net.forward).parameters else {}
                found = self.net(**dict(zip(inputs, given, strict=True)), **more)
                return getattr(found, output) if isinstance(output, str) else found[output]

        return Wrapper()

    return build


_VIT: Mapping[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_LM: Mapping[str, Any] = {
    "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
    "max_position_embeddings": 64,
}  # fmt: skip
_GQA: Mapping[str, Any] = {**_LM, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
_SWIN: Mapping[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_CLIP_PART: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 48,
}  # fmt: skip
_pixels = ("pixel_values",)


def _vision(model: str, config: str, **options: Any) -> Callable[[], Any]:
    return _hf(model, config, _pixels, "logits", num_labels=10, **options)


def _language(model: str, config: str, **options: Any) -> Callable[[], Any]:
    return _hf(model, config, ("input_ids", "attention_mask"), "logits", **options)


def _clip() -> Any:
    import transformers

    made = transformers.CLIPConfig(
        text_config={**_CLIP_PART, "vocab_size": 200, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**_CLIP_PART, "image_size": 32, "patch_size": 8},
        projection_dim=48,
        attn_implementation="eager",
    )
    net = transformers.CLIPModel(made)

    class Towers(lazy_torch().nn.Module):  # type: ignore[misc]  # torch is looked up at run time
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: Any, pixels: Any) -> Any:
            return self.net(input_ids=ids, pixel_values=pixels).logits_per_image

    return Towers()


FAMILIES: dict[str, Family] = {
    **{name: Family(title, build, _image(*size), fixed) for name, title, build, size, fixed in small_networks.NETWORKS},
    "deformable": Family("Deformable convolution", deformable.deformable, _image(3, 32, 32), opset=deformable.OPSET),
    "lstm": Family("LSTM", sequence_networks.lstm, _tokens()),
    "gru": Family("GRU", sequence_networks.gru, _tokens()),
    "gcn": Family("GCN", sequence_networks.gcn, lambda: (lazy_torch().randn(2, 10, 12), lazy_torch().rand(2, 10, 10))),
    "dlrm": Family(
        "DLRM",
        sequence_networks.dlrm,
        lambda: (lazy_torch().randn(4, 13), lazy_torch().randint(0, 50, (4, 6))),
        fixed=True,
    ),
    "lora": Family("LoRA beside every projection", sequence_networks.lora, _tokens()),
    "rope-interleaved": Family("RoPE, interleaved pairs", sequence_networks.rope_interleaved, _tokens()),
    "experts-dense": Family("Mixture of experts, stacked weights", sequence_networks.experts, _tokens()),
    "ssm": Family("Mamba-2 block: grouped heads, state, gate", sequence_networks.ssm, _tokens(), fixed=True),
    "kv-cache": Family(
        "KV cache as inputs and outputs",
        sequence_networks.cached,
        lambda: (lazy_torch().randint(0, 200, (2, 1)), *(lazy_torch().randn(2, 2, 8, 16) for _ in range(4))),
    ),
    "vit": Family("ViT", _vision("ViTForImageClassification", "ViTConfig", **_VIT), _image(3, 32, 32)),
    "deit": Family("DeiT", _vision("DeiTForImageClassification", "DeiTConfig", **_VIT), _image(3, 32, 32)),
    "beit": Family("BEiT", _vision("BeitForImageClassification", "BeitConfig", **_VIT), _image(3, 32, 32)),
    "dinov2-swiglu": Family(
        "DINOv2 with SwiGLU",
        _vision("Dinov2ForImageClassification", "Dinov2Config", **_VIT, mlp_ratio=4, use_swiglu_ffn=True),
        _image(3, 32, 32),
    ),
    "swin": Family("Swin", _vision("SwinForImageClassification", "SwinConfig", **_SWIN), _image(3, 32, 32), True),
    "swin-v2": Family(
        "Swin v2", _vision("Swinv2ForImageClassification", "Swinv2Config", **_SWIN), _image(3, 32, 32), True
    ),
    "convnext": Family(
        "ConvNeXt",
        _vision("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[32, 64, 96, 128], depths=[1] * 4),
        _image(3, 64, 64),
    ),
    "convnext-v2": Family(
        "ConvNeXt v2",
        _vision("ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[32, 64, 96, 128], depths=[1] * 4),
        _image(3, 64, 64),
    ),
    "mobilevit": Family(
        "MobileViT",
        _vision(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            image_size=64,
            hidden_sizes=[48, 64, 80],
            neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 160],
        ),
        _image(3, 64, 64),
        True,
    ),
    "segformer": Family(
        "SegFormer",
        _vision(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            hidden_sizes=[16, 32, 48, 64],
            depths=[1] * 4,
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=64,
        ),
        _image(3, 64, 64),
    ),
    "poolformer": Family(
        "PoolFormer",
        _vision("PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[16, 32, 48, 64], depths=[1] * 4),
        _image(3, 64, 64),
    ),
    "bert": Family("BERT", _language("BertForMaskedLM", "BertConfig", **_LM), _masked()),
    "albert": Family("ALBERT", _language("AlbertForMaskedLM", "AlbertConfig", **_LM, embedding_size=32), _masked()),
    "gpt2": Family(
        "GPT-2, tied embeddings",
        _language("GPT2LMHeadModel", "GPT2Config", vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        _masked(),
    ),
    "gpt-neox": Family("GPT-NeoX: parallel blocks", _language("GPTNeoXForCausalLM", "GPTNeoXConfig", **_LM), _masked()),
    "phi3": Family("Phi-3: fused gate and up", _language("Phi3ForCausalLM", "Phi3Config", **_GQA), _masked()),
    "llama": Family(
        "LLaMA: grouped queries, RoPE halves", _language("LlamaForCausalLM", "LlamaConfig", **_GQA), _masked()
    ),
    "llama-mqa": Family(
        "LLaMA: one KV head",
        _language("LlamaForCausalLM", "LlamaConfig", **{**_GQA, "num_key_value_heads": 1}),
        _masked(),
    ),
    "mistral": Family(
        "Mistral: sliding window", _language("MistralForCausalLM", "MistralConfig", **_GQA, sliding_window=8), _masked()
    ),
    "qwen2": Family("Qwen 2: biases on Q, K, V", _language("Qwen2ForCausalLM", "Qwen2Config", **_GQA), _masked()),
    "qwen3": Family("Qwen 3: QK norm", _language("Qwen3ForCausalLM", "Qwen3Config", **_GQA, head_dim=16), _masked()),
    "gemma2": Family(
        "Gemma 2: soft caps, window",
        _language("Gemma2ForCausalLM", "Gemma2Config", **_GQA, head_dim=16, sliding_window=8),
        _masked(),
    ),
    "mixtral": Family(
        "Mixtral: experts",
        _language("MixtralForCausalLM", "MixtralConfig", **_GQA, num_local_experts=4, num_experts_per_tok=2),
        _masked(),
    ),
    "qwen3-moe": Family(
        "Qwen 3 MoE: QK norm, experts",
        _language("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_GQA, **_EXPERTS, head_dim=16, num_experts=6),
        _masked(),
    ),
    "gpt-oss": Family(
        "GPT-OSS: sinks, window, experts",
        _language(
            "GptOssForCausalLM",
            "GptOssConfig",
            **{**_GQA, "intermediate_size": 96},
            head_dim=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=8,
        ),
        _masked(),
    ),
    "deepseek-v3": Family(
        "DeepSeek V3: latent attention, experts",
        _language(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **{**_GQA, "num_key_value_heads": 4},
            **_EXPERTS,
            n_routed_experts=6,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        _masked(),
    ),
    "t5": Family(
        "T5: encoder, decoder, cross attention",
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            ("input_ids", "decoder_input_ids"),
            "logits",
            vocab_size=200,
            d_model=64,
            d_kv=16,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        lambda: (*_tokens()(), *_tokens(7)()),
    ),
    "clip": Family(
        "CLIP: two towers",
        _clip,
        lambda: (lazy_torch().randint(3, 200, (2, 12)), lazy_torch().randn(2, 3, 32, 32)),
        True,
    ),
    "whisper": Family(
        "Whisper",
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            ("input_features", "decoder_input_ids"),
            "logits",
            vocab_size=200,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=192,
            decoder_ffn_dim=192,
            num_mel_bins=16,
            max_source_positions=32,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        lambda: (lazy_torch().randn(2, 16, 64), *_tokens(7)()),
        True,
    ),
    "mamba": Family(
        "Mamba, as `transformers` unrolls it",
        _language("MambaForCausalLM", "MambaConfig", vocab_size=200, hidden_size=64, state_size=8, num_hidden_layers=2),
        _masked(6),
        True,
    ),
}
"""Name -> family."""


def _dynamo(net: Any, inputs: tuple[Any, ...], names: list[str], path: Path, fixed: bool, opset: int) -> None:
    torch = lazy_torch()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({} if fixed else {0: batch} for _ in inputs)
    parameters = inspect.signature(net.forward).parameters.values()
    nested = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    program = torch.onnx.export(
        net,
        inputs,
        None,
        dynamo=True,
        opset_version=opset,
        input_names=names,
        dynamic_shapes=(shapes,) if nested else shapes,
        verbose=False,
    )
    program.save(str(path), external_data=False)


def export(name: str, path: Path, exporter: str) -> None:
    """Write the model of a family, and its inputs and outputs beside it (`.npz`)."""
    import numpy as np

    torch = lazy_torch()
    family = FAMILIES[name]
    torch.manual_seed(0)
    net, inputs = module(family.build), family.inputs()
    names = [f"in{k}" for k in range(len(inputs))]
    opset = max(OPSETS[exporter], family.opset)
    draft = path.with_suffix(".draft")
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        wanted = net(*inputs)
        if exporter == "dynamo":
            try:
                _dynamo(net, inputs, names, draft, family.fixed, opset)
            except Exception:  # exporters raise anything; what fails again is raised
                if family.fixed:
                    raise
                _dynamo(
                    net, inputs, names, draft, True, opset
                )  # some modules are only exported for one size of the batch
        else:
            axes = {} if family.fixed else {n: {0: "batch"} for n in names}
            torch.onnx.export(
                net, inputs, str(draft), dynamo=False, opset_version=opset, input_names=names,
                dynamic_axes=axes,
            )  # fmt: skip
    outputs = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
    arrays = {f"in:{n}": x.numpy() for n, x in zip(names, inputs, strict=True)}
    np.savez(path.with_suffix(".npz"), **arrays, **{f"out:{k}": y.numpy() for k, y in enumerate(outputs)})
    os.replace(draft, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--exporter", action="append", choices=EXPORTERS, default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ledger = options.folder / "failures.json"
    failures: dict[str, str] = json.loads(ledger.read_text()) if ledger.exists() else {}
    for name in options.names or FAMILIES:
        for exporter in options.exporter or EXPORTERS:
            path = options.folder / f"{name}_{EXPORTERS[exporter]}.onnx"
            if path.exists():
                continue
            failures.pop(path.stem, None)
            try:
                export(name, path, exporter)
                print(f"{path.stem:28} {path.stat().st_size / 1e3:10,.0f} kB", flush=True)
            except Exception as error:  # exporters raise anything
                cause = error.__cause__ or error
                lines = [line for line in str(cause).splitlines() if line.strip()]
                failures[path.stem] = f"{type(cause).__name__}: {lines[0] if lines else ''}"[:200]
                print(f"{path.stem:28} not exported: {failures[path.stem]}", flush=True)
            ledger.write_text(json.dumps(failures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
