"""Exceptions whose messages are written for the user."""


class UserError(Exception):
    """A mistake in the input or the environment. The message is one line: what was wrong, where, and what to do.

    `python -m trainer` prints it without a traceback and exits with code 2. No file has been lost or overwritten.
    """


class Absent(UserError):
    """Data that a path names and that are not there: a dataset without a text to prepare it from, or that text."""


class MachineError(UserError):
    """A fault of the machine or network, not a mistake of the user: the same command may work if it is run again."""


class Damaged(UserError):
    """A file was read completely, but its content is not what was written. Read errors, which may pass, are not Damaged."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop, and there is nothing more to save. line: a message to print, "" for none."""

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(line)
        self.number, self.line = number, line
