"""Apps, logs, images, secrets, volumes, blobs and dicts, as the stand-in of Modal's service answers for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from tests.modal_gpu.world import BLOCK, World


class Objects:
    """For clients, and for one container where `task` says so."""

    def __init__(self, world: World, task: Any = None):
        self.world, self.task = world, task

    # apps
    def do_ClientHello(self, _: Empty) -> pb.ClientHelloResponse:
        return pb.ClientHelloResponse()

    def do_AppCreate(self, request: pb.AppCreateRequest) -> pb.AppCreateResponse:
        app = self.world.new("ap")
        self.world.apps[app] = request
        return pb.AppCreateResponse(app_id=app, app_page_url=f"https://modal.test/{app}")

    def do_AppGetOrCreate(self, request: pb.AppGetOrCreateRequest) -> pb.AppGetOrCreateResponse:
        return pb.AppGetOrCreateResponse(app_id=request.app_name)

    def do_AppGetByDeploymentName(self, _: Any) -> pb.AppGetByDeploymentNameResponse:
        return pb.AppGetByDeploymentNameResponse()

    def do_AppGetLifecycle(self, _: Any) -> pb.AppGetLifecycleResponse:
        return pb.AppGetLifecycleResponse()

    def do_AppPublish(self, _: Any) -> pb.AppPublishResponse:
        return pb.AppPublishResponse(url="https://modal.test/app")

    def do_AppHeartbeat(self, _: Any) -> Empty:
        return Empty()

    def do_AppClientDisconnect(self, _: Any) -> Empty:
        return Empty()

    def do_AppStop(self, request: pb.AppStopRequest) -> Empty:
        self.world.stopped.append(request.app_id)
        return Empty()

    def do_EnvironmentGetOrCreate(self, _: Any) -> pb.EnvironmentGetOrCreateResponse:
        settings = pb.EnvironmentSettings(image_builder_version="2025.06", webhook_suffix="")
        return pb.EnvironmentGetOrCreateResponse(
            environment_id="en-1", metadata=pb.EnvironmentMetadata(name="main", settings=settings)
        )

    async def do_AppGetLogs(self, request: pb.AppGetLogsRequest) -> AsyncIterator[pb.TaskLogsBatch]:
        shown = int(request.last_entry_id or 0)
        until = time.monotonic() + min(request.timeout, 5.0)
        while True:
            for index in range(shown, len(self.world.logs)):
                app, call, text = self.world.logs[index]
                if request.function_call_id in ("", call) and request.app_id == app:
                    yield pb.TaskLogsBatch(
                        entry_id=str(index + 1),
                        items=[pb.TaskLogs(data=text, file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)],
                    )
            shown = len(self.world.logs)
            if time.monotonic() > until:
                return
            await asyncio.sleep(0.05)

    def _lines(self, request: Any) -> list[str]:
        return [
            text
            for app, call, text in self.world.logs
            if request.app_id == app and request.function_call_id in ("", call)
        ]

    def do_AppCountLogs(self, request: Any) -> pb.AppCountLogsResponse:
        bucket = pb.AppCountLogsResponse.LogBucket(stdout_logs=len(self._lines(request)))
        bucket.bucket_start_at.FromSeconds(int(time.time()) - request.bucket_secs)
        return pb.AppCountLogsResponse(buckets=[bucket])

    def do_AppFetchLogs(self, request: Any) -> pb.AppFetchLogsResponse:
        items = [
            pb.TaskLogs(data=text, timestamp=time.time(), file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)
            for text in self._lines(request)
        ]
        return pb.AppFetchLogsResponse(batches=[pb.TaskLogsBatch(items=items[-request.limit or 0 :])])

    # images, mounts, secrets
    def do_ImageGetOrCreate(self, request: pb.ImageGetOrCreateRequest) -> pb.ImageGetOrCreateResponse:
        known = next((key for key, image in self.world.images.items() if image == request.image), None)
        key = known or self.world.new("im")
        self.world.images[key] = request.image
        done = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS) if self.world.building is None else None
        return pb.ImageGetOrCreateResponse(
            image_id=key, result=done, metadata=pb.ImageMetadata(image_builder_version=request.builder_version)
        )

    async def do_ImageJoinStreaming(self, _: pb.ImageJoinStreamingRequest) -> Any:
        yield pb.ImageJoinStreamingResponse(task_logs=[pb.TaskLogs(data="Step 1/3 : FROM nvidia/cuda\n")])
        assert self.world.building is not None
        self.world.building()
        await asyncio.sleep(60)

    def do_MountGetOrCreate(self, request: pb.MountGetOrCreateRequest) -> pb.MountGetOrCreateResponse:
        return pb.MountGetOrCreateResponse(
            mount_id=self.world.new("mo"), handle_metadata=pb.MountHandleMetadata(content_checksum_sha256_hex="0")
        )

    def do_MountPutFile(self, request: pb.MountPutFileRequest) -> pb.MountPutFileResponse:
        if request.WhichOneof("data_oneof") is None:
            return pb.MountPutFileResponse(exists=request.sha256_hex in self.world.uploads)
        self.world.uploads[request.sha256_hex] = (request.data, request.data_blob_id)
        return pb.MountPutFileResponse(exists=True)

    def do_MountBatchedCheckExistence(self, _: Any) -> pb.MountBatchedCheckExistenceResponse:
        return pb.MountBatchedCheckExistenceResponse()

    def do_SecretGetOrCreate(self, request: pb.SecretGetOrCreateRequest) -> pb.SecretGetOrCreateResponse:
        world = self.world
        if request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            name = request.deployment_name
            if name not in world.secret_names:
                raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'")
            key = world.secret_names[name]
            missing = [each for each in request.required_keys if each not in world.secrets[key]]
            if missing:
                raise GRPCError(Status.NOT_FOUND, f"Secret is missing key(s): {', '.join(missing)}")
            return pb.SecretGetOrCreateResponse(secret_id=key)
        key = world.new("st")
        world.secrets[key] = dict(request.env_dict)
        return pb.SecretGetOrCreateResponse(secret_id=key)

    # volumes
    def do_VolumeGetOrCreate(self, request: pb.VolumeGetOrCreateRequest) -> pb.VolumeGetOrCreateResponse:
        folder = self.world.volume(request.deployment_name)
        if request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED and not folder.is_dir():
            raise GRPCError(Status.NOT_FOUND, f"Volume '{request.deployment_name}' not found")
        folder.mkdir(parents=True, exist_ok=True)
        return pb.VolumeGetOrCreateResponse(
            volume_id=f"vo-{request.deployment_name}", metadata=pb.VolumeMetadata(name=request.deployment_name)
        )

    def _volume(self, volume_id: str) -> Path:
        return self.world.volume(volume_id.removeprefix("vo-"))

    async def do_VolumeListFiles(self, request: pb.VolumeListFilesRequest) -> AsyncIterator[pb.VolumeListFilesResponse]:
        root = self._volume(request.volume_id)
        top = root / request.path.strip("/")
        if not top.exists():
            raise GRPCError(Status.NOT_FOUND, f"{request.path}: no such file or directory")
        for path in sorted(top.rglob("*") if request.recursive else top.iterdir()):
            kind = pb.FileEntry.FileType.DIRECTORY if path.is_dir() else pb.FileEntry.FileType.FILE
            found = path.stat()
            entry = pb.FileEntry(
                path=path.relative_to(root).as_posix(), type=kind, mtime=int(found.st_mtime), size=found.st_size
            )
            yield pb.VolumeListFilesResponse(entries=[entry])

    def do_VolumeGetFile2(self, request: pb.VolumeGetFile2Request) -> pb.VolumeGetFile2Response:
        path = self._volume(request.volume_id) / request.path.strip("/")
        if not path.is_file():
            raise GRPCError(Status.NOT_FOUND, f"{request.path}: no such file")
        size = path.stat().st_size
        name = f"{request.volume_id.removeprefix('vo-')}/{request.path.strip('/')}"
        urls = [f"{self.world.blobs_address}/file/{at}/{name}" for at in range(0, size, BLOCK)]
        return pb.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    def do_VolumePutFiles(self, request: pb.VolumePutFilesRequest) -> Empty:
        root = self._volume(request.volume_id)
        for file in request.files:
            data, blob = self.world.uploads[file.sha256_hex]
            path = root / file.filename.strip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.world.blobs[blob] if blob else data)
        return Empty()

    def do_VolumeCommit(self, request: pb.VolumeCommitRequest) -> pb.VolumeCommitResponse:
        assert self.task is not None, "commits are for containers"
        self.task.commit(request.volume_id.removeprefix("vo-"))
        return pb.VolumeCommitResponse(skip_reload=True)

    def do_VolumeReload(self, request: pb.VolumeReloadRequest) -> Empty:
        assert self.task is not None
        self.task.reload(request.volume_id.removeprefix("vo-"))
        return Empty()

    def do_BlobCreate(self, request: pb.BlobCreateRequest) -> pb.BlobCreateResponse:
        blob = self.world.new("bl")
        urls = pb.UploadUrlList(items=[f"{self.world.blobs_address}/blob/{blob}"])
        return pb.BlobCreateResponse(blob_ids=[blob], upload_urls=urls)

    def do_BlobGet(self, request: pb.BlobGetRequest) -> pb.BlobGetResponse:
        return pb.BlobGetResponse(download_url=f"{self.world.blobs_address}/blob/{request.blob_id}")

    # dicts
    def do_DictGetOrCreate(self, request: pb.DictGetOrCreateRequest) -> pb.DictGetOrCreateResponse:
        self.world.dicts.setdefault(request.deployment_name, {})
        return pb.DictGetOrCreateResponse(dict_id=f"di-{request.deployment_name}")

    def _dict(self, dict_id: str) -> dict[bytes, bytes]:
        return self.world.dicts[dict_id.removeprefix("di-")]

    def do_DictGet(self, request: pb.DictGetRequest) -> pb.DictGetResponse:
        value = self._dict(request.dict_id).get(request.key)
        return pb.DictGetResponse(found=value is not None, value=value)

    def do_DictUpdate(self, request: pb.DictUpdateRequest) -> pb.DictUpdateResponse:
        held, created = self._dict(request.dict_id), False
        for entry in request.updates:
            if not (request.if_not_exists and entry.key in held):
                held[entry.key], created = entry.value, True
        return pb.DictUpdateResponse(created=created)

    def do_DictPop(self, request: pb.DictPopRequest) -> pb.DictPopResponse:
        value = self._dict(request.dict_id).pop(request.key, None)
        return pb.DictPopResponse(found=value is not None, value=value)

    async def do_DictContents(self, request: pb.DictContentsRequest) -> AsyncIterator[pb.DictEntry]:
        for key, value in list(self._dict(request.dict_id).items()):
            yield pb.DictEntry(key=key, value=value if request.values else b"")
