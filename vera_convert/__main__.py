"""The program ``vera-convert``, which ``python -m vera_convert`` runs too."""

import _signal  # type: ignore[import-not-found]  # `signal` would import `enum` first, and Python would handle Ctrl-C for longer
import os

_LEAST_MEMORY = 128 << 20
"""The bytes that NumPy's import takes. With less, OpenBLAS ends the process with status 1."""


def main() -> None:
    """Run the command line; a signal at any moment ends with the right status and sentence.

    Until the first line below has run, Python answers SIGINT with a traceback.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from vera_convert.publish.signals import exit_on_signals, ignore_signals

    exit_on_signals()
    _open_closed_streams()
    _require_memory()
    # OpenBLAS starts a thread for each core while NumPy is imported, with 40 MiB of addresses each,
    # and no product of this program uses more than a single thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from vera_convert.cli.app import main as run

        run()
    finally:
        ignore_signals()


def _open_closed_streams() -> None:
    """Open the null device for closed standard streams, so that no output file replaces these."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _require_memory() -> None:
    """End the process with status 3 if there is too little memory to import NumPy."""
    import mmap

    try:
        mmap.mmap(-1, _LEAST_MEMORY).close()
    except OSError:
        os.write(2, b"error: there is not enough memory to start. Raise the limit (ulimit -v).\n")
        os._exit(3)


if __name__ == "__main__":
    main()
