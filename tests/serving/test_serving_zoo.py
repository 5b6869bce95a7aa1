"""Recorded models of many exporters: served as ONNX Runtime runs them, and joined only where that is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spa.feeds import runnable_feeds
from spa.runtime import open_session, run
from spa_server.serving import Engine
from spa_server.serving.errors import NotLoadable
from tests.serving.engines import with_engine
from tests.zoo import MISSING, Recorded, recorded

MODELS = [model for model in recorded() if model.status == "ok" and model.path.stat().st_size < 20 << 20]
ENTANGLED = {"hf_clip_ts": "must not be joined", "mlp3d_dynq": "must not be joined", "gcn_ts": "could not be checked"}
"""Images against texts, one scale for the batch, a graph's nodes as rows."""

pytestmark = pytest.mark.skipif(not MODELS, reason=MISSING)


def linked(folder: Path, model: Recorded) -> None:
    home = folder / "net" / "1"
    home.mkdir(parents=True)
    for file in model.path.parent.glob(f"{model.path.name}*"):
        (home / ("model.onnx" if file == model.path else file.name)).symlink_to(file)


@pytest.mark.parametrize("model", MODELS[::8], ids=lambda model: model.name)
def test_answers_are_onnx_runtimes(tmp_path: Path, model: Recorded) -> None:
    linked(tmp_path, model)
    session = open_session(model.path, provider="cpu", threads=1)
    feeds = runnable_feeds(model.path, session, seed=0)
    expected = run(session, feeds)

    async def work(engine: Engine) -> None:
        await engine.load("net", {"threads": 1, "provider": "cpu"})
        answer = await engine.infer("net", feeds)
        assert [spec.name for spec, _ in answer.outputs] == list(expected)
        for spec, array in answer.outputs:
            np.testing.assert_array_equal(array, expected[spec.name])

    with_engine(tmp_path, work)


@pytest.mark.parametrize("model", [model for model in MODELS if model.name in ENTANGLED], ids=lambda model: model.name)
def test_rows_that_belong_together_are_not_joined(tmp_path: Path, model: Recorded) -> None:
    linked(tmp_path, model)

    async def work(engine: Engine) -> None:
        with pytest.raises(NotLoadable, match=ENTANGLED[model.name]):
            await engine.load("net", {"max_batch": 4})

    with_engine(tmp_path, work)
