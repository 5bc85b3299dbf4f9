"""Errors that a user can mend."""


class UserError(Exception):
    """A mistake that the user can mend: printed as one or two lines without a traceback, exit status 1.

    The message names the thing, what is wrong with it, and what to do.
    """


class Refused(UserError):
    """What was asked of a run cannot be measured here; a new run leaves nothing behind."""
