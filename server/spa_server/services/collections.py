"""Models and datasets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeAlias

import grpc

from spa_server._generated import models_pb2 as pb
from spa_server._generated import models_pb2_grpc as rpc
from spa_server.callers import current
from spa_server.database import Database, collections
from spa_server.database.collections import Collection, Kind
from spa_server.messages import dataset_message, model_message
from spa_server.names import check_display_name, check_paths
from spa_server.uploads import check_sha256

__all__ = ["Datasets", "Models"]

Context: TypeAlias = grpc.aio.ServicerContext


class _Collections:
    def __init__(self, database: Database, most: int) -> None:
        """
        Args:
            database: where they are.
            most: files of one.
        """
        self._database, self._most = database, most

    async def _create(self, kind: Kind, display_name: str, files: Iterable[pb.File]) -> Collection:
        wanted = [(file.path, check_sha256(file.sha256, f"files[{k}].sha256")) for k, file in enumerate(files)]
        check_paths([path for path, _ in wanted], self._most)
        name = check_display_name(display_name or wanted[0][0][:200])
        return await asyncio.to_thread(collections.create, self._database, current().owner, kind, name, wanted)

    async def _get(self, kind: Kind, name: str) -> Collection:
        return await asyncio.to_thread(collections.get, self._database, current().owner, kind, name)

    async def _list(self, kind: Kind, page_size: int, token: str) -> tuple[list[Collection], str]:
        return await asyncio.to_thread(collections.listed, self._database, current().owner, kind, page_size, token)

    async def _delete(self, kind: Kind, name: str) -> None:
        await asyncio.to_thread(collections.remove, self._database, current().owner, kind, name)


class Models(_Collections, rpc.ModelServiceServicer):
    """spa.v1.ModelService."""

    async def CreateModel(self, request: pb.CreateModelRequest, context: Context) -> pb.CreateModelResponse:
        """See the proto."""
        made = await self._create("models", request.display_name, request.files)
        return pb.CreateModelResponse(model=model_message(made))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """See the proto."""
        return pb.GetModelResponse(model=model_message(await self._get("models", request.name)))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """See the proto."""
        found, token = await self._list("models", request.page_size, request.page_token)
        return pb.ListModelsResponse(models=map(model_message, found), next_page_token=token)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> pb.DeleteModelResponse:
        """See the proto."""
        await self._delete("models", request.name)
        return pb.DeleteModelResponse()


class Datasets(_Collections, rpc.DatasetServiceServicer):
    """spa.v1.DatasetService."""

    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: Context) -> pb.CreateDatasetResponse:
        """See the proto."""
        made = await self._create("datasets", request.display_name, request.files)
        return pb.CreateDatasetResponse(dataset=dataset_message(made))

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        """See the proto."""
        return pb.GetDatasetResponse(dataset=dataset_message(await self._get("datasets", request.name)))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        """See the proto."""
        found, token = await self._list("datasets", request.page_size, request.page_token)
        return pb.ListDatasetsResponse(datasets=map(dataset_message, found), next_page_token=token)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context) -> pb.DeleteDatasetResponse:
        """See the proto."""
        await self._delete("datasets", request.name)
        return pb.DeleteDatasetResponse()
