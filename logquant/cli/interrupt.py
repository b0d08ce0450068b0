"""Ctrl-C ends a measurement, not what it has found."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import typer

EXIT_CODE = 130
"""Of a command that was interrupted, as shells have it."""


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed; called, it says so."""

    asked: bool = False

    def __call__(self) -> bool:
        return self.asked

    def leave(self) -> None:
        """End the command with :data:`EXIT_CODE` if it was interrupted; called once all is printed and written."""
        if self.asked:
            raise typer.Exit(EXIT_CODE)


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it, the first Ctrl-C asks to stop after the step at hand and the second stops at once.

    Either way what comes after the block runs: it shows what was found until then, and calls :meth:`Interrupt.leave`.
    """
    interrupt = Interrupt()

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        with contextlib.suppress(RuntimeError):  # stderr may be in the middle of a line
            typer.echo("\n[logquant] stops after this step; Ctrl-C again: at once", err=True)

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield interrupt
    except KeyboardInterrupt:
        interrupt.asked = True
    finally:
        signal.signal(signal.SIGINT, previous)
