"""The gRPC edge of what the image commands need beyond CRI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cri.images.store import Images
from protos.people.v1 import people_pb2 as people
from protos.people.v1 import people_pb2_grpc

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class ArchiveService(people_pb2_grpc.ArchiveServiceServicer):
    def __init__(self, images: Images) -> None:
        self._images = images

    async def ImportImages(self, request: people.ImportImagesRequest, context: Context) -> people.ImportImagesResponse:
        from cri.images.importing import import_images  # rarely used, and it takes decompressors along

        found = await import_images(self._images, request.path, request.name)
        return people.ImportImagesResponse(images=[people.ImportedImage(image_ref=i.id, names=names) for i, names in found])
