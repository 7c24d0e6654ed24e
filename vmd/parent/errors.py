"""The reason why a VM cannot start, for its requester."""

from vmd.wire.messages import ErrorCode


class ResourceError(Exception):
    """A resource of the VM is unavailable; `str()` is one line."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
