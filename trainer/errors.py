"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake in input or surroundings, told in one line: what was wrong, where, and what to do.

    `python -m trainer` prints it without a traceback and exits with code 2; nothing has been lost or overwritten.
    """
