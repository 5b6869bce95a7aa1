"""Calibration data: text and tokenizers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from spa.calibration import load_calibration
from spa.errors import UsageError
from spa.signature import as_ir
from tests.test_calibration import embedding, model

tokenizers = pytest.importorskip("tokenizers", reason="the library tokenizers is not installed")
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "dog", "sat", "ran", "on", "mat"]
ID = {word: k for k, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One word, one token; [CLS] text [SEP] text [SEP]; padding and truncation switched on, as many files have it."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=40)
    made.enable_truncation(3)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def ids(text: str) -> list[int]:
    return [2, *(ID.get(word, 1) for word in text.split()), 3]


def lines(folder: Path, *texts: str, name: str = "calib.txt") -> Path:
    path = folder / name
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


BERT = model(
    input_ids=(["n", "t"], INT64), attention_mask=(["n", "t"], FLOAT), token_type_ids=(["n", "t"], INT32),
    position_ids=(["n", "t"], INT64),
)  # fmt: skip
TEXTS = ("the cat sat", "the dog ran on the mat", "a dog sat", "the mat")


def test_one_bucket_per_length_and_no_padding(tmp_path: Path, tokenizer: Path) -> None:
    calibration = load_calibration(lines(tmp_path, *TEXTS, "", "  "), BERT, tokenizer=tokenizer)
    assert (calibration.name, calibration.samples) == ("text calib.txt", 4)
    buckets = [bucket["input_ids"].tolist() for bucket in calibration.feeds]
    assert buckets == [[ids(TEXTS[3])], [ids(TEXTS[0]), ids(TEXTS[2])], [ids(TEXTS[1])]]
    second = calibration.feeds[1]
    assert second["attention_mask"].tolist() == [[1.0] * 5] * 2
    assert second["attention_mask"].dtype == np.float32
    assert second["token_type_ids"].tolist() == [[0] * 5] * 2
    assert second["token_type_ids"].dtype == np.int32
    assert second["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_pairs_strings_and_objects(tmp_path: Path, tokenizer: Path) -> None:
    rows = ['{"text": "the cat", "text_pair": "the dog"}', '"the mat"', '{"text": "on", "label": 3}']
    graph = model(input_ids=(["n", "t"], INT64), segment_ids=(["n", "t"], INT64))
    calibration = load_calibration(lines(tmp_path, *rows, name="c.jsonl"), graph, tokenizer=tokenizer)
    assert [b["input_ids"].tolist() for b in calibration.feeds] == [
        [ids("on")],
        [ids("the mat")],
        [[2, 4, 5, 3, 4, 6, 3]],
    ]
    assert calibration.feeds[2]["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_long_texts_are_cut(tmp_path: Path, tokenizer: Path) -> None:
    path = lines(tmp_path, " ".join(["cat"] * 300), "the mat")
    for options, longest in (({}, 128), ({"max_length": 7}, 7)):
        calibration = load_calibration(path, embedding(50), tokenizer=tokenizer, **options)
        assert [b["ids"].shape for b in calibration.feeds] == [(1, 4), (1, longest)]
        assert calibration.feeds[1]["ids"][0, [0, -1]].tolist() == [2, 3]


def test_a_fixed_length_with_a_mask_is_padded(tmp_path: Path, tokenizer: Path) -> None:
    graph = model(input_ids=([1, 6], INT64), attention_mask=([1, 6], INT64))
    calibration = load_calibration(lines(tmp_path, *TEXTS), graph, tokenizer=tokenizer)
    assert (calibration.samples, calibration.fixed) == (4, 1)
    feeds = calibration.feeds[0]
    assert feeds["input_ids"][0].tolist() == [*ids(TEXTS[0]), 0]
    assert feeds["attention_mask"].sum(axis=1).tolist() == [5, 6, 5, 4]
    assert feeds["input_ids"][1, -1] == 3
    with pytest.raises(UsageError, match="max_length 7 is more than the 6 tokens"):
        load_calibration(lines(tmp_path, *TEXTS), graph, tokenizer=tokenizer, max_length=7)


def test_a_fixed_length_without_a_mask_is_filled_with_text(tmp_path: Path, tokenizer: Path) -> None:
    graph = model(tokens=(["n", 4], INT64))
    calibration = load_calibration(lines(tmp_path, *TEXTS), graph, tokenizer=tokenizer)
    # texts are cut at 4 tokens, special ones included, and then laid end to end
    stream = [token for text in TEXTS for token in [*ids(text)[:3], 3]]
    assert calibration.feeds[0]["tokens"].reshape(-1).tolist() == stream
    with pytest.raises(UsageError, match="has 3 tokens, but the model takes 9"):
        load_calibration(lines(tmp_path, "cat"), model(tokens=(["n", 9], INT64)), tokenizer=tokenizer)


def test_samples_take_some_texts(tmp_path: Path, tokenizer: Path) -> None:
    path = lines(tmp_path, *(f"{'cat ' * (k + 1)}" for k in range(20)))
    calibration = load_calibration(path, embedding(50), tokenizer=tokenizer, samples=5)
    lengths = [b["ids"].shape[1] - 2 for b in calibration.feeds]
    assert all(4 * k < length <= 4 * (k + 1) for k, length in enumerate(lengths))


def test_a_fixed_batch_takes_whole_batches_of_one_length(tmp_path: Path, tokenizer: Path) -> None:
    graph = model(input_ids=([2, "t"], INT64))
    calibration = load_calibration(lines(tmp_path, *TEXTS), graph, tokenizer=tokenizer)
    assert [b["input_ids"].shape for b in calibration.batches(9)] == [(2, 5)]
    with pytest.raises(UsageError, match="too few samples"):
        load_calibration(lines(tmp_path, *TEXTS[1:3]), graph, tokenizer=tokenizer)


def test_text_that_cannot_be_used(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, graph = lines(tmp_path, *TEXTS), embedding(50)
    (tmp_path / "broken.json").write_text("{}")
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (path, graph, {}, "text needs `tokenizer`"),
        (path, graph, {"tokenizer": tmp_path / "gone.json"}, r"gone\.json is no file"),
        (path, graph, {"tokenizer": tmp_path / "broken.json"}, r"broken\.json is not a tokenizer\.json"),
        (path, embedding(10), {"tokenizer": tokenizer}, "token 10, but .* 'ids' up in a table of 10"),
        (path, graph, {"tokenizer": tokenizer, "max_length": 0}, "max_length must be 1 or more"),
        (path, graph, {"tokenizer": tokenizer, "preprocess": "unit"}, "preprocess is for images"),
        (path, model(x=(["n", "t"], FLOAT)), {"tokenizer": tokenizer}, "what to give input 'x'"),
        (path, model(input_ids=(["n", "t"], INT64), pixel_values=(["n", "t"], FLOAT)), {"tokenizer": tokenizer},
         "what to give input 'pixel_values'"),
        (path, model(input_ids=(["n", "t"], INT64), decoder_input_ids=(["n", "t"], INT64)), {"tokenizer": tokenizer},
         "what to give input 'decoder_input_ids'"),
        (path, model(input_ids=(["n", "t", 2], INT64)), {"tokenizer": tokenizer}, "'input_ids' has 3 axes"),
        (path, model(attention_mask=(["n", "t"], INT64), token_type_ids=(["n", "t"], INT64)), {"tokenizer": tokenizer},
         "no input takes token ids"),
        (path, model(input_ids=(["n", 4], INT64), attention_mask=(["n", 5], INT64)), {"tokenizer": tokenizer},
         r"different lengths \(4, 5\)"),
        (lines(tmp_path, "", " ", name="e.txt"), graph, {"tokenizer": tokenizer}, "has no text"),
        (lines(tmp_path, '"a"', "{", name="b.jsonl"), graph, {"tokenizer": tokenizer}, "line 2 is not valid JSON"),
        (lines(tmp_path, '{"txt": 1}', name="k.jsonl"), graph, {"tokenizer": tokenizer}, "line 1 has no text"),
        (lines(tmp_path, "the cat", "the cat", name="s.txt"), graph, {"tokenizer": tokenizer}, "identical"),
    ]  # fmt: skip
    for source, net, options, message in cases:
        with pytest.raises(UsageError, match=message):
            load_calibration(source, net, **options)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        load_calibration(tmp_path / "latin.txt", graph, tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'tokenizers>=0\.20'"):
        load_calibration(path, graph, tokenizer=tokenizer)


def test_the_recorded_sentence_encoder(data_root: Path, tmp_path: Path) -> None:
    """Sentences that mean the same come out close: the ids are those the encoder was trained with."""
    from spa.runtime import open_session, run

    path = data_root / "data" / "models" / "minilm_l6_v2_sentence.onnx"
    tokenizer = data_root / "data" / "data" / "minilm_tokenizer.json"
    if not path.is_file() or not tokenizer.is_file():
        pytest.skip(f"no trained models in {data_root}")
    rows = ["a man is eating food", "someone eats a meal", "the stock market fell sharply"]
    source = lines(tmp_path, *map(json.dumps, rows), name="c.jsonl")
    calibration = load_calibration(source, as_ir(path), tokenizer=tokenizer)
    session = open_session(path, provider="cpu", threads=2)
    vectors = [next(iter(run(session, batch).values()))[0] for batch in calibration.batches(1)]
    similar = sorted(float(a @ b) for k, a in enumerate(vectors) for b in vectors[k + 1 :])
    assert len(similar) == 3
    assert similar[2] > 0.6
    assert similar[1] < 0.2
