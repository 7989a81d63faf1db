"""Block I/O classes: the file that names them (goresctrl's format, as containerd and CRI-O read it), and which one a container is in. Pure.

    Classes:
      slow:
        - Weight: 80                                  # without Devices: the default of the class
        - Devices: ["/dev/sd[a-z]", "/dev/disk/by-id/*SSD*"]
          ThrottleReadBps: 50M
          ThrottleWriteIOPS: 5k
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from cri.errors import FailedPrecondition
from protos.runtime.v1 import api_pb2 as v1
from shim.oci import spec as oci

CONTAINER_ANNOTATION: Final = "io.kubernetes.cri.blockio-class"  # of the container
POD_ANNOTATION: Final = "blockio.resources.beta.kubernetes.io/pod"  # of the pod, for all its containers
POD_CONTAINER_PREFIX: Final = "blockio.resources.beta.kubernetes.io/container."  # of the pod, with the container's name

Devices = Callable[[str], Sequence[tuple[int, int]]]  # whole block devices that match a pattern: (major, minor)
Classes = Mapping[str, "tuple[Item, ...]"]

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_DECIMAL = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3)} | {s: Decimal(10 ** (6 + 3 * i)) for i, s in enumerate("MGTPE")}
_BINARY = {f"{s}i": Decimal(1 << (10 * (i + 1))) for i, s in enumerate("KMGTPE")}
_THROTTLES = ("throttlereadbps", "throttlewritebps", "throttlereadiops", "throttlewriteiops")


class BlockioError(ValueError):
    """A file that is no configuration of classes: which field, and why."""


@dataclass(frozen=True, slots=True)
class Item:
    """Parameters of the devices that match, or of the class where ``devices`` is empty. None: not set."""

    devices: tuple[str, ...] = ()
    weight: int | None = None
    throttles: tuple[int | None, ...] = (None,) * 4  # read and write bytes, read and write operations, per second


def parse(tree: object) -> Classes:
    """Classes by name. Raises BlockioError."""
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise BlockioError("not a map")
    lowered = _keys(tree, ("classes",), "")
    classes = lowered.get("classes")
    if classes is None:
        return {}
    if not isinstance(classes, dict):
        raise BlockioError("Classes: not a map")
    return {str(name): _class(items, f"Classes.{name}") for name, items in classes.items()}


def _keys(tree: Mapping[object, object], known: Sequence[str], at: str) -> dict[str, object]:
    """By lower-case name, as Go's decoder finds fields."""
    lowered = {str(key).lower(): value for key, value in tree.items()}
    unknown = sorted(str(key) for key in tree if str(key).lower() not in known)
    if unknown:
        raise BlockioError(f"{at}{'.' if at else ''}{unknown[0]}: unknown key")
    return lowered


def _class(items: object, at: str) -> tuple[Item, ...]:
    if items is None:
        return ()
    if not isinstance(items, list):
        raise BlockioError(f"{at}: not a list")
    return tuple(_item(item, f"{at}[{i}]") for i, item in enumerate(items))


def _item(item: object, at: str) -> Item:
    if not isinstance(item, dict):
        raise BlockioError(f"{at}: not a map")
    fields = _keys(item, ("devices", "weight", *_THROTTLES), at)
    devices = fields.get("devices") or []
    if not isinstance(devices, list) or not all(isinstance(d, str) and d.startswith("/") and "\0" not in d for d in devices):
        raise BlockioError(f"{at}.Devices: not a list of absolute paths or patterns")
    weight = _quantity(fields.get("weight"), f"{at}.Weight")
    if weight is not None and not 10 <= weight <= 1000:
        raise BlockioError(f"{at}.Weight: {weight} is outside 10..1000")
    throttles = tuple(_quantity(fields.get(name), f"{at}.{name}") for name in _THROTTLES)
    if not devices and any(t is not None for t in throttles):
        raise BlockioError(f"{at}: throttles without Devices")
    return Item(tuple(devices), weight, throttles)


def _quantity(value: object, at: str) -> int | None:
    """A Kubernetes quantity, rounded up; None where there is none."""
    if value is None or value == "":
        return None
    text = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise BlockioError(f"{at}: {value!r:.40} is not a quantity such as 50M")
    exact = Decimal(match[1]) * (_DECIMAL | _BINARY)[match[2] or ""]
    if exact >= 2**63:
        raise BlockioError(f"{at}: {value!r:.40} is too large")
    return math.ceil(exact)


def class_of(config: v1.ContainerConfig, pod: v1.PodSandboxConfig) -> str:
    """The class that the annotations ask for: the container's own, then the pod's for this container, then the pod's for all."""
    asked = config.annotations.get(CONTAINER_ANNOTATION, "")
    asked = asked or pod.annotations.get(f"{POD_CONTAINER_PREFIX}{config.metadata.name}", "")
    return asked or pod.annotations.get(POD_ANNOTATION, "")


def build(name: str, classes: Classes, devices: Devices) -> oci.BlockIO:
    """What the class means on the devices that are there; a later item overrides an earlier one. Raises FailedPrecondition."""
    items = classes.get(name)
    if items is None:
        raise FailedPrecondition(f"blockio class {name!r:.80} is not one of {', '.join(sorted(classes)) or 'none'}")
    weight: int | None = None
    weights: dict[tuple[int, int], int] = {}
    throttles: tuple[dict[tuple[int, int], int], ...] = ({}, {}, {}, {})
    for item in items:
        if not item.devices:
            weight = item.weight if item.weight is not None else weight
            continue
        for number in (number for pattern in item.devices for number in devices(pattern)):
            if item.weight is not None:
                weights[number] = item.weight
            for rates, rate in zip(throttles, item.throttles, strict=True):
                if rate is not None:
                    rates[number] = rate
    weighted = tuple(oci.WeightDevice(major, minor, one) for (major, minor), one in sorted(weights.items()))
    rated = [tuple(oci.ThrottleDevice(major, minor, rate) for (major, minor), rate in sorted(t.items())) for t in throttles]
    return oci.BlockIO(weight, None, weighted, *rated)
