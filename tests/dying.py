"""A function that ends the process that decodes images; this module imports nothing that takes long."""

import os
import signal
from typing import Any


def die(*_: Any, **__: Any) -> None:
    """End this process as the kernel does when the memory is full."""
    os.kill(os.getpid(), signal.SIGKILL)
