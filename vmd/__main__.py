"""Entry point of `vmd` and `python -m vmd`."""

import sys

from vmd.options import USAGE, Options, UsageError, parse_options
from vmm_kvm.standard_streams import run_program
from vmm_kvm.text import printable


def main() -> None:
    """Run the daemon, or check a configuration with -n; exits with its status."""
    run_program("vmd", _run)


def _run() -> int:
    try:
        options = parse_options(sys.argv[1:])
    except UsageError:
        sys.exit(USAGE)
    if options.asks_version:
        from vmm_kvm.version import version  # noqa: PLC0415 - only for this

        sys.stdout.write(f"vmd {version()}\n")
        return 0
    if options.is_check:
        return _check(options)
    from vmd.daemon import StartError, run  # noqa: PLC0415 - a check needs none of it

    try:
        return run(options)
    except StartError as err:
        sys.exit(f"vmd: {printable(str(err))}")


def _check(options: Options) -> int:
    """Print the configuration file's errors, or that it is valid."""
    import os  # noqa: PLC0415 - as above

    from vmd.config.check import check, parse_macro  # noqa: PLC0415 - as above
    from vmd.confine import landlock  # noqa: PLC0415 - as above
    from vmd.rules.trial import trial  # noqa: PLC0415 - as above
    from vmd.shared.paths import SYSTEM_CONFIG, user_config  # noqa: PLC0415 - as above
    from vmd.unusable import unusable  # noqa: PLC0415 - as above

    macros = {}
    for text in options.macros:
        macro = parse_macro(text)
        if macro is None:
            sys.stderr.write(f"vmd: could not parse macro definition {printable(text)}\n")
        else:
            macros[macro[0]] = macro[1]
    path = options.config
    if path is None:
        path = user_config(os.environ) if options.is_user else SYSTEM_CONFIG
    lines, status = check(
        os.devnull if path is None else path,
        macros,
        is_optional=options.config is None,
        is_verbose=options.verbosity > 0,
        is_user=options.is_user,
        judge=trial,
        inspect=unusable,
    )
    if advice := landlock.missing():
        lines = [*lines, f"vmd: {advice}"]
    sys.stderr.writelines(f"{line}\n" for line in lines)
    return status


if __name__ == "__main__":
    main()
