"""The program ``vera-convert``, which ``python -m vera_convert`` runs too."""

import signal


def main() -> None:
    """Run the command line; a signal at any moment ends with the right status and sentence."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it would print a traceback
    from vera_convert.publish.signals import exit_on_signals, ignore_signals

    exit_on_signals()
    try:
        from vera_convert.cli.app import main as run

        run()
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
