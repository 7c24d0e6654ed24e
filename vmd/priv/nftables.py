"""nftables, by its own library: a text of rules takes effect as a whole, or not at all.

The library runs in this process and only speaks netlink, so that its caller can be confined; `nft
-f` would have to be executed with all its privileges.

Source: libnftables(3)
"""

import ctypes

_LIBRARY = "libnftables.so.1"


class NftablesError(Exception):
    """The library is missing, or the kernel or it refuses the rules; `str()` is one line."""


class Nftables:
    """A connection to nftables. For one thread."""

    def __init__(self) -> None:
        """Load the library and connect.

        Raises:
            NftablesError: there is no library, or no room.
        """
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as err:
            raise NftablesError(f"no nftables: {err}") from err
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_new.restype = ctypes.c_void_p
        for name in ("nft_ctx_buffer_error", "nft_ctx_buffer_output", "nft_ctx_free"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        for name in ("nft_ctx_get_error_buffer", "nft_ctx_get_output_buffer"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
            getattr(library, name).restype = ctypes.c_char_p
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._library = library
        context: int | None = library.nft_ctx_new(0)
        if context is None:
            raise NftablesError("no nftables: out of memory")
        self._context = ctypes.c_void_p(context)
        library.nft_ctx_buffer_error(self._context)
        library.nft_ctx_buffer_output(self._context)

    def close(self) -> None:
        """Disconnect."""
        self._library.nft_ctx_free(self._context)

    def run(self, rules: str) -> None:
        """Carry out commands, all or none.

        Raises:
            NftablesError: they are wrong, or the kernel refuses them.
        """
        status = self._library.nft_run_cmd_from_buffer(self._context, rules.encode())
        told = self._library.nft_ctx_get_error_buffer(self._context) or b""
        self._library.nft_ctx_get_output_buffer(self._context)  # which empties it
        if status:
            first = told.decode(errors="replace").strip().split("\n")[0]
            raise NftablesError(f"nftables: {first or 'failed'}")
