"""Values by a key, as many as fit into so many bytes: what was used last stays."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any


class Shelf:
    """A dictionary that forgets what was not used for longest. For several threads.

    limit: bytes that it holds at most. A value that is larger alone is not taken.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Any, nbytes: int) -> None:
        """Keep a value of so many bytes."""
        if nbytes > self._limit:
            return
        with self._lock:
            self._drop(key)
            self._values[key] = (value, nbytes)
            self.nbytes += nbytes
            while self.nbytes > self._limit:
                self._drop(next(iter(self._values)))

    def drop_where(self, unwanted: Callable[[Any], bool]) -> None:
        """Forget the values whose key is unwanted."""
        with self._lock:
            for key in [key for key in self._values if unwanted(key)]:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        if key in self._values:
            self.nbytes -= self._values.pop(key)[1]
