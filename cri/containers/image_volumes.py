"""Image volumes of a container: which images its mounts mean, and what the recipe of its root says of them."""

from __future__ import annotations

from dataclasses import dataclass

from cri.errors import CriError, ImageVolumeMountFailed
from cri.images.model import Image
from cri.images.store import Images
from cri.spec import mounts, strings
from protos.runtime.v1 import api_pb2 as v1
from shim.errors import Failure
from shim.oci.bundle import IMAGE_VOLUME, Volume


@dataclass(frozen=True, slots=True)
class Found:
    """One mount of an image that is here."""

    field: str
    destination: str
    image: Image
    sub_path: str
    asked: str  # the image as the request has it, for messages


def find(config: v1.ContainerConfig, images: Images) -> list[Found]:
    """The image of every mount that wants one. Raises ImageVolumeMountFailed for one that is not on this node, and
    SignatureValidationFailed for one that the policy forbids."""
    found = []
    for i, mount in enumerate(config.mounts):
        field = f"config.mounts[{i}]"
        if not mount.HasField("image"):
            continue
        mounts.check_image(mount, field)
        image = images.get(mount.image.image)
        if image is None:
            raise ImageVolumeMountFailed(f"{field}.image: {mount.image.image!r:.200} is not on this node", hint="pull it first")
        images.require_trusted(image, _name(mount.image))
        images.require_trusted(image, _name(mount.image))
        found.append(Found(field, strings.clean(mount.container_path), image, mount.image_sub_path, _name(mount.image)))
    return found


def _name(image: v1.ImageSpec) -> str:
    return image.user_specified_image or image.image


def recipes(found: list[Found], images: Images, *, labelled: bool = False) -> tuple[Volume, ...]:
    """What to show where; the images must be kept by something for as long as it is shown. ``labelled``: with an SELinux label, which only
    a file system of its own can have: so one layer alone, which would be bound, gets an empty one below it."""
    empty = images.snapshots.view(()).lower if labelled else ()
    lowers = [images.view(one.image).lower for one in found]
    lowers = [lower if len(lower) > 1 else (*lower, *empty) for lower in lowers]
    return tuple(Volume(one.destination, lower, one.sub_path) for one, lower in zip(found, lowers, strict=True))


def explain(failure: Failure, found: list[Found]) -> CriError | None:
    """The error the kubelet knows, if ``failure`` is about an image volume; it ends up in the pod's events, so it names the image."""
    if failure.operation != IMAGE_VOLUME:
        return None
    for one in found:
        if one.destination == failure.path:
            about = Failure("", errno=failure.errno, message=failure.message)
            return ImageVolumeMountFailed(f"{one.field}: image {one.asked!r:.200}: {about}", hint=failure.hint)
    return ImageVolumeMountFailed(str(failure))
