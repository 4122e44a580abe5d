"""Reasons to stop that the user should read as one line, without a traceback."""

from pathlib import Path


class UserError(Exception):
    """A wrong argument, file or folder; says which, what was given, what is allowed."""


class Diverged(UserError):
    """The loss or a gradient is no longer finite."""


class Interrupted(Exception):
    """Stopped on request after saving a step in a run's folder."""

    def __init__(self, step: int, folder: Path):
        super().__init__(f"interrupted: step {step} is saved in {folder}")
        self.folder = folder
