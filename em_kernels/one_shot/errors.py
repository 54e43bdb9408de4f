"""The error of the one-shot system whose message is meant for the user."""


class UsageError(ValueError):
    """An error that the user can do something about: a mistake, or a limit of the machine or of an installed package.

    The message says what was found and what would work; the command line prints the message alone, with no traceback.
    """
