"""Numbers and structures of the FUSE protocol, by the names that the kernel's header gives them.

A test compares all of them with `<linux/fuse.h>`. Structures are in the byte order of the host,
which is the guest's.

Source: Linux include/uapi/linux/fuse.h
"""

import struct
from typing import Final

FUSE_KERNEL_VERSION = 7
FUSE_KERNEL_MINOR_VERSION = 38
FUSE_ROOT_ID = 1

# fuse_setattr_in.valid
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8

# fuse_open_out.open_flags
FOPEN_KEEP_CACHE = 1 << 1

# fuse_init_in.flags
FUSE_ASYNC_READ = 1 << 0
FUSE_BIG_WRITES = 1 << 5
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_MAX_PAGES = 1 << 22

FUSE_GETATTR_FH = 1 << 0
FUSE_FSYNC_FDATASYNC = 1 << 0

# enum fuse_opcode
FUSE_LOOKUP = 1
FUSE_FORGET = 2
FUSE_GETATTR = 3
FUSE_SETATTR = 4
FUSE_READLINK = 5
FUSE_SYMLINK = 6
FUSE_MKNOD = 8
FUSE_MKDIR = 9
FUSE_UNLINK = 10
FUSE_RMDIR = 11
FUSE_RENAME = 12
FUSE_LINK = 13
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_STATFS = 17
FUSE_RELEASE = 18
FUSE_FSYNC = 20
FUSE_FLUSH = 25
FUSE_INIT = 26
FUSE_OPENDIR = 27
FUSE_READDIR = 28
FUSE_RELEASEDIR = 29
FUSE_FSYNCDIR = 30
FUSE_ACCESS = 34
FUSE_CREATE = 35
FUSE_INTERRUPT = 36
FUSE_DESTROY = 38
FUSE_BATCH_FORGET = 42
FUSE_FALLOCATE = 43
FUSE_READDIRPLUS = 44
FUSE_RENAME2 = 45
FUSE_LSEEK = 46

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
OUT_HEADER: Final = struct.Struct("=IiQ")
ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY_OUT: Final = struct.Struct("=QQQQII")
"""Without the `attr` that follows."""
ATTR_OUT: Final = struct.Struct("=QII")
"""Without the `attr` that follows."""
INIT_IN: Final = struct.Struct("=IIII")
"""Without what later versions have added."""
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI7I")
FORGET_IN: Final = struct.Struct("=Q")
FORGET_ONE: Final = struct.Struct("=QQ")
BATCH_FORGET_IN: Final = struct.Struct("=II")
GETATTR_IN: Final = struct.Struct("=IIQ")
SETATTR_IN: Final = struct.Struct("=IIQQQQQQIIIIIIII")
MKNOD_IN: Final = struct.Struct("=IIII")
MKDIR_IN: Final = struct.Struct("=II")
RENAME_IN: Final = struct.Struct("=Q")
RENAME2_IN: Final = struct.Struct("=QII")
LINK_IN: Final = struct.Struct("=Q")
OPEN_IN: Final = struct.Struct("=II")
OPEN_OUT: Final = struct.Struct("=QII")
CREATE_IN: Final = struct.Struct("=IIII")
RELEASE_IN: Final = struct.Struct("=QIIQ")
READ_IN: Final = struct.Struct("=QQIIQII")
WRITE_IN: Final = struct.Struct("=QQIIQII")
WRITE_OUT: Final = struct.Struct("=II")
STATFS_OUT: Final = struct.Struct("=QQQQQIIII6I")
FSYNC_IN: Final = struct.Struct("=QII")
FALLOCATE_IN: Final = struct.Struct("=QQQII")
LSEEK_IN: Final = struct.Struct("=QQII")
LSEEK_OUT: Final = struct.Struct("=Q")
DIRENT: Final = struct.Struct("=QQII")
"""Without the name that follows, and the padding to eight bytes."""
