"""``python -m vera_convert`` is ``vera-convert``."""

from vera_convert.cli import main

main()
