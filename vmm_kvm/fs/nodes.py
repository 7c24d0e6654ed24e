"""The nodes of a guest: what it has looked up, and has not forgotten.

A guest may remember more files than a process has descriptors. So a node has one only while it is
in use or was used of late; else it has the node of its directory and its name there, by which it is
opened again. It must be the same file then (device, inode number, kind), or the guest is told that
its handle is stale.
"""

import errno
import os
import stat
from collections import OrderedDict

from vmm_kvm.fs.abi import FUSE_ROOT_ID
from vmm_kvm.fs.tree import Tree, fail

NODES_MAX = 1 << 19
"""Nodes of one guest; about 250 MiB."""
DEPTH_MAX = 4096
"""Directories from a node up to the root, or to one that has a descriptor."""
DESCRIPTORS_MIN = 16
"""Descriptors that a table needs: the directories of one request are never taken away from it."""

_DEVICES_MAX, _DEVICE_SHIFT = 255, 56

Key = tuple[int, int, int]
"""Device, inode number, kind."""


class Node:
    """A file, a directory or something else that the guest knows."""

    __slots__ = ("children", "fd", "id", "key", "lookups", "name", "parent", "pins")

    def __init__(self, number: int, key: Key, fd: int, parent: "Node | None", name: bytes) -> None:
        self.id = number
        self.key = key
        self.fd = fd
        """Of O_PATH; -1 while it has none."""
        self.parent = parent
        self.name = name
        self.lookups = 0
        """How often the guest was told of it and has not forgotten it."""
        self.children = 0
        """Nodes whose parent it is."""
        self.pins = 0
        """Reasons not to take its descriptor away."""


def key_of(status: os.stat_result) -> Key:
    """Return what tells a file from others."""
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


class Nodes:
    """A table of nodes; owns their descriptors, but the root's."""

    def __init__(self, tree: Tree, descriptors: int, nodes_max: int = NODES_MAX) -> None:
        """Begin with the root of `tree`; at most `descriptors` nodes have one of their own."""
        self._tree = tree
        self._descriptors = max(descriptors, DESCRIPTORS_MIN)
        self._nodes_max = nodes_max
        self._next = FUSE_ROOT_ID + 1
        self.root = Node(FUSE_ROOT_ID, key_of(os.fstat(tree.root)), tree.root, None, b"")
        self.root.pins = 1
        self._devices = {self.root.key[0]: 0}
        """Numbers of file systems, in the order in which they were met."""
        self._by_id = {FUSE_ROOT_ID: self.root}
        self._by_key = {self.root.key: self.root}
        self._recent: OrderedDict[int, Node] = OrderedDict()
        """Those with a descriptor that may be taken away, the next to lose it first."""

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def open_descriptors(self) -> int:
        """How many nodes have a descriptor that may be taken away."""
        return len(self._recent)

    def clear(self) -> None:
        """Forget all but the root."""
        for node in self._by_id.values():
            if node is not self.root and node.fd >= 0:
                os.close(node.fd)
        self._recent.clear()
        self.root.children = self.root.lookups = 0
        self._by_id = {FUSE_ROOT_ID: self.root}
        self._by_key = {self.root.key: self.root}

    def get(self, number: int) -> Node:
        """Return a node by its number.

        Raises:
            OSError: there is none.
        """
        node = self._by_id.get(number)
        if node is None:
            fail(errno.ESTALE)
        return node

    def inode_of(self, status: os.stat_result) -> int:
        """Return an inode number for the guest, to which all that is shared is one file system.

        Those of other file systems than the root's differ from its own in the upper byte.
        """
        number = self._devices.get(status.st_dev)
        if number is None:
            number = min(len(self._devices), _DEVICES_MAX)
            if number < _DEVICES_MAX:
                self._devices[status.st_dev] = number
        return status.st_ino ^ number << _DEVICE_SHIFT

    def has_room(self) -> bool:
        """Tell whether one more can be known."""
        return len(self._by_id) < self._nodes_max

    def look_up(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Return what a directory has under a name, which the guest is told of.

        Raises:
            OSError: there is nothing, or no room.
        """
        return self.add(parent, name, self._tree.open_child(self.fd_of(parent), name))

    def add(self, parent: Node, name: bytes, fd: int) -> tuple[Node, os.stat_result]:
        """Return the node of what `fd`, of O_PATH, is, which the guest is told of; takes it over.

        Raises:
            OSError: there is no room.
        """
        try:
            status = os.fstat(fd)
            key = key_of(status)
            node = self._by_key.get(key)
            if node is None and not self.has_room():
                fail(errno.ENFILE)
        except OSError:
            os.close(fd)
            raise
        if node is None:
            node = Node(self._next, key, -1, parent, name)
            self._next += 1
            parent.children += 1
            self._by_id[node.id] = self._by_key[key] = node
        else:
            self._place(node, parent, name)
        node.lookups += 1
        self._give(node, fd)
        return node, status

    def note_move(self, parent: Node, name: bytes) -> None:
        """Learn that something was renamed: it has this name now, if it is still there."""
        try:
            fd = self._tree.open_child(self.fd_of(parent), name)
        except OSError:
            return
        node = self._by_key.get(key_of(os.fstat(fd)))
        os.close(fd)
        if node:
            self._place(node, parent, name)

    def fd_of(self, node: Node) -> int:
        """Return the descriptor of a node, which is the node's, and valid for this request.

        Raises:
            OSError: it is not where it was.
        """
        if node.fd < 0:
            self._open(node)
        elif not node.pins:
            self._recent.move_to_end(node.id)
        return node.fd

    def pin(self, node: Node) -> None:
        """Keep a node's descriptor, until `unpin`: the guest has it open."""
        self.fd_of(node)
        node.pins += 1
        self._recent.pop(node.id, None)

    def unpin(self, node: Node) -> None:
        """Undo one `pin`."""
        node.pins -= 1
        if not node.pins and node.fd >= 0:
            self._recent[node.id] = node
            self._drop(node)
            self._shrink()

    def forget(self, number: int, count: int) -> None:
        """Learn that the guest has forgotten what it was told so many times; it may lie."""
        node = self._by_id.get(number)
        if node:
            node.lookups = max(0, node.lookups - count)
            self._drop(node)

    def _place(self, node: Node, parent: Node, name: bytes) -> None:
        """Note where a node is found."""
        if node is self.root or (node.parent is parent and node.name == name):
            return
        before, node.parent, node.name = node.parent, parent, name
        parent.children += 1
        if before:
            before.children -= 1
            self._drop(before)

    def _drop(self, node: Node) -> None:
        """Remove a node that nothing needs, and directories that nothing else needs."""
        current: Node | None = node
        while current and not (
            current.lookups or current.children or current.pins or current is self.root
        ):
            if self._by_id.pop(current.id, None) is None:
                return
            del self._by_key[current.key]
            self._recent.pop(current.id, None)
            if current.fd >= 0:
                os.close(current.fd)
                current.fd = -1
            current = current.parent
            if current:
                current.children -= 1

    def _give(self, node: Node, fd: int) -> None:
        """Let a node have a descriptor, if it has none."""
        if node.fd >= 0:
            os.close(fd)
            self.fd_of(node)
            return
        node.fd = fd
        if not node.pins:
            self._recent[node.id] = node
            self._shrink()

    def _shrink(self) -> None:
        while len(self._recent) > self._descriptors:
            _number, oldest = self._recent.popitem(last=False)
            os.close(oldest.fd)
            oldest.fd = -1

    def _open(self, node: Node) -> None:
        """Open a node again, and the directories on the way to it."""
        way = [node]
        while way[-1].fd < 0:
            parent = way[-1].parent
            if parent is None or len(way) > DEPTH_MAX:
                fail(errno.ESTALE)
            way.append(parent)
        directory = way.pop().fd
        owned = -1
        try:
            for one in reversed(way):
                fd = self._tree.open_child(directory, one.name)
                if owned >= 0:
                    os.close(owned)
                directory = owned = fd
                if key_of(os.fstat(fd)) != one.key:
                    fail(errno.ESTALE)
        except OSError as err:
            if owned >= 0:
                os.close(owned)
            if err.errno in {errno.ENOENT, errno.ENOTDIR}:
                fail(errno.ESTALE)
            raise
        # Nodes on the way get none: a walk takes away at most one descriptor.
        self._give(node, owned)
