"""Work that threads do before its results are asked for: reading and decoding."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def results(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int, most: int
) -> Iterator[Any]:
    """function(item) of each item, in their order.

    Args:
      function: runs in threads.
      items: asked for one by one, as results are taken.
      threads: how many.
      most: results that are made or being made beyond the one that was taken last.
    """
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
