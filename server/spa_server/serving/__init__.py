"""Serving models with the Open Inference Protocol.

`engine` answers requests and knows no grpc; `service` is the protocol in front of it.
`python -m spa_server.serving FOLDER` serves a folder on this machine.
"""

from __future__ import annotations

from spa_server.serving.engine import Answer, Engine, Limits
from spa_server.serving.options import ModelOptions, parse_options
from spa_server.serving.source import FolderSource, ModelSource
from spa_server.serving.trial import Trial

__all__ = ["Answer", "Engine", "FolderSource", "Limits", "ModelOptions", "ModelSource", "Trial", "parse_options"]
