"""CRI's ImageService in terms of the store: requests in, responses out, one function per RPC."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from cri.errors import InvalidArgument
from cri.images import auth, reference
from cri.images.model import Image
from cri.images.reference import BadReference
from cri.images.store import Images
from cri.images.usage import FsInfo, Usage
from protos.runtime.v1 import api_pb2 as v1

_PER_MESSAGE = 200  # images in one message of StreamImages; 16 MiB would hold some ten thousand


def list_images(images: Images, request: v1.ListImagesRequest) -> v1.ListImagesResponse:
    return v1.ListImagesResponse(images=_filtered(images, request.filter))


def stream_images(images: Images, request: v1.StreamImagesRequest) -> Iterator[v1.StreamImagesResponse]:
    found = list(_filtered(images, request.filter))
    for start in range(0, len(found), _PER_MESSAGE):
        yield v1.StreamImagesResponse(images=found[start : start + _PER_MESSAGE])


def image_status(images: Images, request: v1.ImageStatusRequest) -> v1.ImageStatusResponse:
    """No image is an empty answer, not an error. Verbose adds the config and, while it is being pulled, how far that is."""
    if not request.image.image:
        raise InvalidArgument("empty", field="image.image")
    image = images.get(request.image.image)
    response = v1.ImageStatusResponse(image=to_proto(image) if image else None)
    if request.verbose:
        if image:
            response.info["info"] = json.dumps(images.details(image))
        if progress := _progress(images, request.image.image):
            response.info["progress"] = json.dumps(progress)
    return response


async def pull_image(images: Images, handlers: Collection[str], request: v1.PullImageRequest) -> v1.PullImageResponse:
    """Answers the image id, the same that every other RPC uses."""
    if request.image.runtime_handler and request.image.runtime_handler not in handlers:
        raise InvalidArgument(f"unknown runtime handler {request.image.runtime_handler!r}", field="image.runtime_handler")
    given = request.auth
    credentials = auth.from_fields(
        given.username, given.password, given.auth, given.server_address, given.identity_token, given.registry_token
    )
    image = await images.pull(request.image.image, credentials)
    return v1.PullImageResponse(image_ref=image.id)


async def remove_image(images: Images, request: v1.RemoveImageRequest) -> v1.RemoveImageResponse:
    if not request.image.image:
        raise InvalidArgument("empty", field="image.image")
    await images.remove(request.image.image)
    return v1.RemoveImageResponse()


async def image_fs_info(images: Images) -> v1.ImageFsInfoResponse:
    info = await images.fs_info()
    return v1.ImageFsInfoResponse(
        image_filesystems=[_filesystem(info, info.images)], container_filesystems=[_filesystem(info, info.containers)]
    )


def to_proto(image: Image) -> v1.Image:
    """CRI's view of an image. A numeric user is ``uid``, any other ``username``; the kubelet's runAsNonRoot check reads them."""
    user = image.config.user.partition(":")[0]
    # Only what is a uid to the kernel counts as one: anything else stays a name, which is looked up (and refused) inside the image.
    numeric = user.isascii() and user.isdigit() and int(user) < 2**32 - 1
    return v1.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=max(image.size, 1),
        uid=v1.Int64Value(value=int(user)) if numeric else None,
        username="" if numeric else user,
        spec=v1.ImageSpec(image=image.repo_tags[0] if image.repo_tags else image.ref),
        pinned=image.pinned,
    )


def _filtered(images: Images, wanted: v1.ImageFilter) -> Iterator[v1.Image]:
    if wanted.image.image:
        found = images.get(wanted.image.image)
        return iter([to_proto(found)] if found else [])
    return (to_proto(image) for image in images.list())


def _progress(images: Images, ref: str) -> dict[str, object] | None:
    try:
        name = str(reference.parse(ref))
    except BadReference:
        return None
    return next((p.to_json() for p in images.pulls.progress() if name in p.references), None)


def _filesystem(info: FsInfo, usage: Usage) -> v1.FilesystemUsage:
    return v1.FilesystemUsage(
        timestamp=info.timestamp,
        fs_id=v1.FilesystemIdentifier(mountpoint=info.mountpoint),
        used_bytes=v1.UInt64Value(value=usage.bytes),
        inodes_used=v1.UInt64Value(value=usage.inodes),
    )
