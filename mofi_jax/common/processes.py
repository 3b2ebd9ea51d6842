"""What worker processes do for the process that started them."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def die_with_parent() -> None:
    """Ends this worker when the parent is gone.

    A worker waits on a queue whose writing end it holds itself, so after kill -9 of the parent it
    would wait for ever.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
