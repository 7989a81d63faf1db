"""The daemon's error types. Raised once, where the fault is known; turned into a gRPC status only in ``api/interceptor.py``.

Importable without grpc: a code is the *name* of a ``grpc.StatusCode`` member. ``shim.errors.Failure`` is what comes from below (the
kernel, the runtime core); it needs no wrapping, ``status_of`` knows both.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from shim.errors import Failure


class CriError(Exception):
    """A refusal with a gRPC code. The text is lower case, without a full stop, and free of secrets."""

    code: ClassVar[str] = "UNKNOWN"
    #: Word the kubelet looks for at the very start of the message of an UNKNOWN status (cri-api pkg/errors); empty for none.
    sentinel: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        text = f"{self.message} (hint: {self.hint})" if self.hint else self.message
        return f"{self.sentinel}: {text}" if self.sentinel else text


class Unknown(CriError):
    """Something outside this program refused; the kubelet prints an UNKNOWN status without decoration."""


class NotFound(CriError):
    """No such pod, container or image. The kubelet takes this code as proof that it is gone."""

    code = "NOT_FOUND"


class AlreadyExists(CriError):
    """The name is taken by something else than an operation in flight."""

    code = "ALREADY_EXISTS"


class InvalidArgument(CriError):
    """A request field can never be right as sent. ``field`` is its path as in the proto, e.g. ``config.linux.resources``."""

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message, hint=hint)
        self.field = field


class FailedPrecondition(CriError):
    """Right request, wrong moment: the container is not running, the sandbox is not ready, the image is in use."""

    code = "FAILED_PRECONDITION"


class Unavailable(CriError):
    """A part is not there right now (supervisor being replaced, network not ready); the same request may work soon."""

    code = "UNAVAILABLE"


class DeadlineExceeded(CriError):
    """Time given by the caller ran out (ExecSync's timeout, a stop that the process outlived)."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(CriError):
    """A bound of ours was reached (message size, output size, addresses)."""

    code = "RESOURCE_EXHAUSTED"


class PermissionDenied(CriError):
    """Refused by policy."""

    code = "PERMISSION_DENIED"


class Aborted(CriError):
    """Another operation on the same object got in between (a pod stopped while its container was being created)."""

    code = "ABORTED"


class Unimplemented(CriError):
    """Known to CRI, not built here."""

    code = "UNIMPLEMENTED"


class Internal(CriError):
    """A promise of this program is broken (a corrupt record, an impossible state)."""

    code = "INTERNAL"


class ImageNotFound(NotFound):
    """No local image has this reference. RemoveImage does not raise it: removing nothing succeeds."""


class AccessDenied(Unknown):
    """The registry wants other credentials, or has no such repository and does not say so."""


class RegistryUnavailable(CriError):
    """The registry could not be reached or answered 5xx; becomes the waiting reason ``RegistryUnavailable`` of the container."""

    sentinel = "RegistryUnavailable"


class SignatureValidationFailed(CriError):
    """The signature policy rejects the image."""

    sentinel = "SignatureValidationFailed"


class RROUnsupported(CriError):
    """A recursive read-only mount was required and the kernel or this handler cannot do it."""

    sentinel = "RROUnsupported"


class ImageVolumeMountFailed(CriError):
    """An image volume (or its sub_path) could not be mounted."""

    sentinel = "ImageVolumeMountFailed"


class ConfigError(Exception):
    """The configuration cannot be used; one line that names the file, flag or variable and the key. Never crosses gRPC."""


class StartError(Exception):
    """The daemon cannot run here; one line that says why and, if it can, what to do. Never crosses gRPC."""


def status_of(error: BaseException) -> tuple[str, str]:
    """Code name and text for an exception that reached the gRPC edge.

    Unexpected exceptions say only their type and text: the traceback goes to the log, not to the client.
    """
    if isinstance(error, CriError):
        return error.code, str(error)
    if isinstance(error, Failure):
        # ENOENT of a path says nothing about the container, and the kubelet takes NOT_FOUND as "gone": only the records may say that.
        return "DEADLINE_EXCEEDED" if error.errno == errno.ETIMEDOUT else "UNKNOWN", str(error)
    if isinstance(error, TimeoutError):
        return "DEADLINE_EXCEEDED", str(error) or "timed out"
    if isinstance(error, OSError):
        path = error.filename if isinstance(error.filename, str) else ""
        return "UNKNOWN", str(Failure("", "", errno=error.errno, path=path, message=str(error) if error.errno is None else ""))
    return "INTERNAL", f"{type(error).__name__}: {error}"
