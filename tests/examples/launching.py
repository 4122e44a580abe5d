"""What a script needs that a test starts in a process of its own."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(folder, **others):
    """Returns variables for one device, with vocabularies and compiled code kept."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
        **others,
    }
