"""The gRPC edge of CRI's ImageService: one delegating line per RPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import TYPE_CHECKING, Any

from cri.images import rpc
from cri.images.store import Images
from protos.runtime.v1 import api_pb2 as v1
from protos.runtime.v1 import api_pb2_grpc

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class ImageService(api_pb2_grpc.ImageServiceServicer):
    """``handlers`` are the names of the configured runtime handlers."""

    def __init__(self, images: Images, handlers: Collection[str] = ("",)) -> None:
        self._images, self._handlers = images, handlers

    async def ListImages(self, request: v1.ListImagesRequest, context: Context) -> v1.ListImagesResponse:
        return rpc.list_images(self._images, request)

    async def StreamImages(self, request: v1.StreamImagesRequest, context: Context) -> AsyncIterator[v1.StreamImagesResponse]:
        for response in rpc.stream_images(self._images, request):
            yield response

    async def ImageStatus(self, request: v1.ImageStatusRequest, context: Context) -> v1.ImageStatusResponse:
        return rpc.image_status(self._images, request)

    async def PullImage(self, request: v1.PullImageRequest, context: Context) -> v1.PullImageResponse:
        return await rpc.pull_image(self._images, self._handlers, request)

    async def RemoveImage(self, request: v1.RemoveImageRequest, context: Context) -> v1.RemoveImageResponse:
        return await rpc.remove_image(self._images, request)

    async def ImageFsInfo(self, request: v1.ImageFsInfoRequest, context: Context) -> v1.ImageFsInfoResponse:
        return await rpc.image_fs_info(self._images)
