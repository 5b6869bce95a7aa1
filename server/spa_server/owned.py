"""Models of the database as the inference service looks for them.

A model is known there by its id, behind the folder name of its owner. Its version `1` is what was uploaded; what jobs
made of it are further versions, named by the ids of the jobs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from spa.errors import ModelError
from spa_server.blobs import Blobs
from spa_server.database import Database
from spa_server.database.collections import files_of
from spa_server.database.tables import collections, jobs
from spa_server.held import StoredFile
from spa_server.names import owner_folder
from spa_server.serving.errors import NotFound

__all__ = ["UPLOADED", "OwnedModels"]

UPLOADED = "1"
"""The version that was uploaded; a number, so that it answers those who name no version."""
_MAKES_MODELS = ("prune", "finetune")


class OwnedModels:
    """A `ModelSource` of all owners' models."""

    def __init__(self, database: Database, blobs: Blobs, folder: Path) -> None:
        """
        Args:
            database: knows the models.
            blobs: has their files.
            folder: for copies while they are opened.
        """
        self._database, self._blobs, self._folder = database, blobs, folder

    def models(self) -> Sequence[str]:
        """Names of all models."""
        query = select(collections.c.owner, collections.c.id).where(collections.c.kind == "models")
        with self._database.read() as connection:
            return [f"{owner_folder(row.owner)}/{row.id}" for row in connection.execute(query)]

    def versions(self, model: str) -> Mapping[str, str]:
        """Version -> digests of its files. Raises: NotFound."""
        return {version: repr(files) for version, files in self._versions(model).items()}

    def options(self, model: str) -> Mapping[Any, Any]:
        """None: they are given when a model is loaded. Raises: NotFound."""
        self._versions(model)
        return {}

    @contextlib.contextmanager
    def open(self, model: str, version: str) -> Iterator[Path]:
        """Copies of its files. Raises: NotFound, ModelError."""
        files = self._versions(model).get(version)
        if not files:
            raise NotFound(f"this model has no version {version!r}.")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            try:
                for file in files:
                    self._blobs.place(file.sha256, Path(name, file.path))
            except OSError as error:
                raise ModelError(f"the files of version {version!r} cannot be had ({error.strerror})") from error
            yield Path(name, files[0].path)

    def _versions(self, model: str) -> dict[str, tuple[StoredFile, ...]]:
        space, _, id_ = model.partition("/")
        with self._database.read() as connection:
            mine = (collections.c.id == id_, collections.c.kind == "models")
            row = connection.execute(select(collections).where(*mine)).first()
            if row is None or owner_folder(row.owner) != space:
                raise NotFound(f"there is no model {id_!r}.")
            made = _made_of(connection, row.owner, f"models/{id_}")
            models = {UPLOADED: files_of(connection, f"models/{id_}")}
            models |= {job: _model_files(files_of(connection, f"jobs/{job}"), name) for job, name in made.items()}
        return models


def _made_of(connection: Connection, owner: str, model: str) -> dict[str, str]:
    """Jobs that made a model of this one, or of what another job had made of it: id -> name of the file."""
    query = select(jobs.c.id, jobs.c.spec).where(jobs.c.owner == owner, jobs.c.state == "succeeded")
    made: dict[str, str] = {}
    roots = {model}
    for row in connection.execute(query.order_by(jobs.c.created)):  # what is made of a job's result is younger
        source = "/".join(str(row.spec.get("model", "")).split("/")[:2])
        if row.spec["kind"] in _MAKES_MODELS and source in roots:
            made[row.id] = row.spec.get("output_name", "model.onnx")
            roots.add(f"jobs/{row.id}")
    return made


def _model_files(files: Sequence[StoredFile], name: str) -> tuple[StoredFile, ...]:
    wanted = (name, f"{name}.data")
    return tuple(sorted((file for file in files if file.path in wanted), key=lambda file: file.path != name))
