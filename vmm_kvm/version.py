"""The installed version, from the package's metadata."""

_DISTRIBUTION = "vmm-kvm"


def version() -> str:
    """Return the version; `unknown` where nothing was installed, as in a bare source tree."""
    from importlib.metadata import PackageNotFoundError  # noqa: PLC0415 - hardly ever asked
    from importlib.metadata import version as version_of  # noqa: PLC0415 - the same

    try:
        return version_of(_DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
