"""The one exception for bad input: the command line prints it without a traceback and exits with code 2."""


class InputError(Exception):
    """Something the user gave is wrong. The message names the file, the line or field, the value, and what to do."""


class NotSaved(InputError):
    """A run came to its end, and what it trained cannot be written: exit code 1."""
