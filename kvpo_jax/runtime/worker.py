"""A thread that writes what the training loop need not wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Worker:
    """Calls functions one after another in a thread of its own.

    What one of them raises is raised by the next call of a method, at the latest by `close`.

    Args:
      name: of the thread.
      most: how many calls may wait for their turn; a further one waits for them. None: any number.
    """

    def __init__(self, name: str, most: int | None = None):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: deque[Future[None]] = deque()
        self._most = most

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls function(*arguments), soon."""
        while self._pending and (self._pending[0].done() or self._full()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(function, *arguments))

    def _full(self) -> bool:
        return self._most is not None and len(self._pending) > self._most

    def wait(self) -> None:
        """Waits until all is done."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Waits until all is done and ends the thread, also after an error."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
