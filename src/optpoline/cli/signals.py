# SPDX-License-Identifier: Apache-2.0
"""Signals as requests: nothing is ever raised in the middle of a session.

A signal that raised would unwind wherever it hits, also while threads of the
target are stopped. So a handler only takes note, the session sees a set
``threading.Event`` at its next opportunity, and every byte is put back on the
ordinary way out. The same holds for the second Ctrl-C.

``Event.set`` takes a lock that the interrupted thread may hold in ``wait``; a
handler must not call it. ``SimpleQueue.put`` is reentrant: a thread waits at the
other end and sets the event.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

__all__ = ["SignalRelay"]


class SignalRelay:
    """Catches signals while it is entered (main thread only).

    A signal that was ignored when we started (``nohup``, a background job of a
    script) stays ignored.

    Args:
        stopping: Signals that set ``stop``.
        relayed: Signals handed to ``relay`` instead.
        relay: What to do with those; called in the signal handler, so it may
            only make reentrant calls such as ``os.kill``.
    """

    def __init__(
        self,
        stopping: Iterable[signal.Signals] = (),
        relayed: Iterable[signal.Signals] = (),
        relay: Callable[[int], None] | None = None,
    ) -> None:
        """Take note of what to catch; nothing is caught yet."""
        self.stop = threading.Event()
        self.received: int | None = None
        self._stopping = tuple(stopping)
        self._relayed = tuple(relayed)
        self._relay = relay
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._set_stop, name="signals", daemon=True)
        self._previous: dict[int, object] = {}

    def __enter__(self) -> SignalRelay:
        """Catch the signals."""
        self._thread.start()
        for number in self._stopping:
            self._catch(number, self._on_stopping)
        for number in self._relayed:
            self._catch(number, self._on_relayed)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was in force before."""
        for number, handler in self._previous.items():
            if handler is None or isinstance(handler, int) or callable(handler):
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._queue.put(None)
        self._thread.join()

    def request_stop(self) -> None:
        """Set ``stop`` as a signal would; may be called from any thread."""
        self._queue.put(0)

    def _catch(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        """Install one handler, unless the signal is ignored."""
        if signal.getsignal(number) is not signal.SIG_IGN:
            self._previous[number] = signal.signal(number, handler)

    def _on_stopping(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal and ask for the end."""
        if self.received is None:
            self.received = number
        self._queue.put(number)

    def _on_relayed(self, number: int, _frame: FrameType | None) -> None:
        """Hand the signal on."""
        if self._relay is not None:
            self._relay(number)

    def _set_stop(self) -> None:
        """Wait for requests, outside of any signal handler."""
        while self._queue.get() is not None:
            self.stop.set()
