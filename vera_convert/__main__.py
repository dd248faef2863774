"""The program ``vera-convert``, which ``python -m vera_convert`` runs too."""

import _signal  # type: ignore[import-not-found]  # `signal` would import `enum` first, and Python would handle Ctrl-C for longer


def main() -> None:
    """Run the command line; a signal at any moment ends with the right status and sentence.

    Until the first line below has run, Python answers SIGINT with a traceback.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from vera_convert.publish.signals import exit_on_signals, ignore_signals

    exit_on_signals()
    try:
        from vera_convert.cli.app import main as run

        run()
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
