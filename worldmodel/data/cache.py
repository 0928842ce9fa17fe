"""What was read and decoded once, kept while there is room for it."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class ByteCache:
    """Least-recently-used cache bounded by the bytes of what it holds; safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._items: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The value of `key`, made on a miss; a value larger than the whole cache is returned without being kept."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
        value = make()
        nbytes = size(value)
        with self._lock:
            if key not in self._items and nbytes <= self.limit:
                self._items[key] = (value, nbytes)
                self.used += nbytes
            while self.used > self.limit:
                self.used -= self._items.popitem(last=False)[1][1]
        return value
