"""Errors that are the user's to mend, as opposed to faults of this package."""


class UserError(ValueError):
    """A mistake in the data, files, options or settings that a user passed in.

    The command line prints the message as one line. Any other ValueError, TypeError or RuntimeError
    is a fault of this package and keeps its traceback.
    """
