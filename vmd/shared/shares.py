"""What the parent hands the process that it forks for a shared directory."""

from typing import NamedTuple

from vmd.config.shares import ShareOption


class ShareOrder(NamedTuple):
    """A share to be served, with descriptors of the process that is forked."""

    vm: str
    """The VM's name."""
    option: ShareOption
    uid: int | None
    """With whose rights; None for those of the process."""
    socket: int
    """The connection to the VM's process."""
    status: int
    """The pipe by which that one learns that it is ready, or why it cannot be."""
    directory: int | None = None
    """A client's, or a parcel with it; None for one that is named."""
    cgroup: int | None = None
    """For joining a control group."""

    @property
    def fds(self) -> list[int]:
        """All of them."""
        return [
            self.socket,
            self.status,
            *(fd for fd in (self.directory, self.cgroup) if fd is not None),
        ]
