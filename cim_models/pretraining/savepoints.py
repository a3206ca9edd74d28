"""When a run saves: every so many steps, every so many minutes, at its end, and before a signal ends it."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from cim_models.pretraining.config import PretrainConfig
from cim_models.processes import ALONE, Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TIME = 1
"""Asks for a save without an end; below every signal's number."""


class SavePoints:
    """The steps after which a run saves, the same ones in all processes.

    While it is entered, SIGINT and SIGTERM are noted in place of ending the process; `end_if_asked` does, after the
    save, what the signal would have done: in all processes, whichever of them noted it.

    Args:
        config: Of the run.
        steps: Of the whole run.
        processes: Of the run; the clock of the first one counts.
    """

    def __init__(self, config: PretrainConfig, steps: int, processes: Processes = ALONE) -> None:
        self.config, self.steps, self.processes = config, steps, processes
        self.seconds = 60 * config.save_minutes if processes.first and config.save_minutes else float("inf")
        self.received, self.last = 0, time.monotonic()
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SavePoints":
        if threading.current_thread() is threading.main_thread():  # no other can have handlers
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
            self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received == number == signal.SIGINT
        if again and self.processes.count == 1:  # launchers send it twice; a person means it
            raise KeyboardInterrupt
        self.received = number

    def reached(self, done: int) -> bool:
        """Whether to save after this step; one exchange of a number between processes."""
        late = time.monotonic() - self.last > self.seconds
        asked = self.processes.greatest(self.received or (_TIME if late else 0))
        if asked > _TIME:
            self.received = asked
        reached = bool(asked) or done % self.config.save_every == 0 or done == self.steps
        if reached:
            self.last = time.monotonic()
        return reached

    def wait(self) -> None:
        """Waits for all processes, of which the first one may have computed alone for hours."""
        self.processes.greatest(0)

    def end_if_asked(self) -> None:
        """Does what the signal that was noted would have done; a handler of the caller's may let the run go on.

        Raises:
            KeyboardInterrupt: By Python's own handler of SIGINT.
            SystemExit: In place of the system's own way to end a process, so that files are closed and readers end.
        """
        asked = self.processes.greatest(self.received)
        if not asked:
            return
        before = self.before.get(signal.Signals(asked), signal.SIG_DFL)
        self.__exit__()
        if before == signal.SIG_DFL:
            raise SystemExit(128 + asked)
        signal.raise_signal(asked)
        self.received = 0
        self.__enter__()
