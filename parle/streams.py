"""Standard streams: usable if they were closed, cannot encode a character, or cannot be written."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def prepare_streams() -> None:
    """Replace streams that were closed before the program started, and accept characters that a stream cannot encode.

    A file name that is not UTF-8 is printed as the bytes that it consists of, any other such character as `?`.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # takes the descriptor of the closed stream, the lowest free one: else the next file would get its output
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    codecs.register_error("parle.replace", _encode_file_name_or_replace)
    sys.stdout.reconfigure(errors="parle.replace")
    sys.stderr.reconfigure(errors="parle.replace")


def _encode_file_name_or_replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handle an encoding error: os.fsdecode has made lone surrogates of the bytes of a file name."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


def print_line(text: str) -> None:
    """Print a line on stdout at once; the program continues if that is impossible."""
    with ignore_write_errors(sys.stdout):
        print(text, flush=True)


@contextlib.contextmanager
def ignore_write_errors(stream: TextIO) -> Iterator[None]:
    """Discard output, and let the program continue, if the reader of `stream` is gone or the disk is full."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
