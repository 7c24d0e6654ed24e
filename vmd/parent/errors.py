"""Why a VM cannot start, as its requester is told."""

from vmd.wire.messages import ErrorCode


class ResourceError(Exception):
    """Something that the VM needs cannot be had; `str()` is one line."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
