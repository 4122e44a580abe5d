"""A warning that points to the line which called this package."""

import os
import sys
import warnings

import jax
import optax

_PACKAGES = (os.path.dirname(__file__), *jax.__path__, *optax.__path__)
_INSIDE = tuple(os.path.join(path, "") for path in _PACKAGES)


def warn(message: str) -> None:
    """Warns of what a caller should know, at the caller's own line."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
