"""What loky keeps to itself, and we need: joblib 1.6, `joblib/externals/loky/process_executor.py`."""

from __future__ import annotations

import sys

from joblib.externals.loky import process_executor


def keep_this_worker() -> None:
    """Called inside of a worker: it is not replaced by a fresh one as its memory grows.

    Where psutil is installed, loky ends a worker whose memory has grown by 300 MB since its first work, and the next
    one knows nothing of what this one was given. An rlprune worker holds a model and its statistics from then on.
    """
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
