"""What Ctrl-C and SIGTERM do: while a command starts they end the process, later they raise KeyboardInterrupt.

While modules are imported there is nothing to save, and the code of libraries may lose an exception that a signal
raises there, or raise another one in its place. While Python ends they do nothing: all is done and said by then,
and their handlers are no longer called.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STATUS = 130  # of an interrupted command


class Interrupted(Exception):  # noqa: N818
    """A command was interrupted, and has nothing more to say about it."""


def exit_on_interrupt() -> None:
    """From now on end the process at once, with a line on standard error."""
    _handle(_exit)


def raise_on_interrupt() -> None:
    """From now on raise KeyboardInterrupt."""
    _handle(signal.default_int_handler)


def ignore_interrupts() -> None:
    """From now on do nothing."""
    _handle(signal.SIG_IGN)


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts what it runs in the background
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"fedsim: interrupted\n")
    os._exit(STATUS)
