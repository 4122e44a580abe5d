"""Reasons to stop that the user should read as one line, without a traceback."""


class UserError(Exception):
    """A wrong argument, file or folder; says which, what was given, what is allowed."""


class Diverged(UserError):
    """The loss or a gradient is no longer finite."""


class CannotSave(UserError):
    """A checkpoint could not be written."""


class Interrupted(KeyboardInterrupt):
    """Stopped by Ctrl-C or SIGTERM, after saving a checkpoint."""
