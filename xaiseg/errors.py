"""What users are meant to see instead of a traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, what was found, what was expected and what to do about it.
    The command line prints it without a traceback and exits with status 1.
    """


class Stopped(Exception):
    """A run was told to stop, by a signal; what it had finished is recorded, and the same command goes on from there."""
