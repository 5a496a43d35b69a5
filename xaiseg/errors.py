"""The one error that users are meant to see."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, what was found, what was expected and what to do about it.
    The command line prints it without a traceback and exits with status 1.
    """
