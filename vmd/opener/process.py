"""Receive one list of files, open them with the rights of a client, and answer.

However slow the file system of a client's file is, only this process waits for it; the parent kills
it when its time is over. It parses the headers of images for their bases, which may name any file:
it opens none that the client could not open.
"""

from vmd.shared.opening import Files, OpeningError
from vmd.wire.channel import Channel, ChannelError
from vmd.wire.files import FilesOpened, OpenerToParent, OpenFiles, OpeningFailed
from vmm_kvm.log import Log

log = Log(__name__)


def serve(parent: Channel[OpenerToParent, OpenFiles]) -> None:
    """Answer the one request that comes from `parent`."""
    failure: OpeningError | None = None
    try:
        received = parent.wait()
        with received.fds as passed, Files() as files:
            try:
                files.open(received.message.files, passed)
                parent.send(FilesOpened(files=tuple(files.found)), files.take())
            except OpeningError as err:
                failure = err
        if failure:  # everything is closed and unlocked by now: the next start may come at once
            parent.send(OpeningFailed(code=failure.code, message=str(failure)))
    except ChannelError as err:
        log.debug("parent: %s", err)
