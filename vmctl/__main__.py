"""Entry point of `vmctl` and `python -m vmctl`.

Nothing is imported before SIGINT has its default action: until then Python answers ^C by a
traceback.
"""


def main() -> None:
    """Run the command line and exit with its status."""
    import signal  # noqa: PLC0415 - see above

    # At ^C a command dies silently; those with something to restore handle the signal themselves.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import gc  # noqa: PLC0415 - see above

    gc.disable()  # modules stay: collecting garbage among them finds none
    from vmm_kvm.standard_streams import run_program  # noqa: PLC0415 - see above

    run_program("vmctl", _main)


def _main() -> int:
    from vmctl.line.cli import main as run_command_line  # noqa: PLC0415 - when all streams are open

    return run_command_line(on_loaded=_keep_modules)


def _keep_modules() -> None:
    import gc  # noqa: PLC0415 - see above

    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    main()
