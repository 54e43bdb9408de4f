"""The error of the one-shot system whose message is meant for the user."""


class UsageError(ValueError):
    """A mistake, or a limit of the machine or of an installed package, that the user can do something about.

    The message says what was found and what would work; the command line prints the message alone, with no traceback.
    """
