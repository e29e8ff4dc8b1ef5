"""The exceptions a user is meant to read."""


class UserError(Exception):
    """A mistake in input or surroundings, told in one line: what was wrong, where, and what to do.

    `python -m trainer` prints it without a traceback and exits with code 2; nothing has been lost or overwritten.
    """


class MachineError(UserError):
    """A fault of the machines and not of what was asked: the same command may work when it is started again."""


class Damaged(UserError):
    """Content that was read whole and is not what was written: never an error of reading, which may pass."""


class Stopped(KeyboardInterrupt):
    """A signal has asked this process to stop before it had anything to save. line: to tell, where it is known what there is."""

    def __init__(self, number: int, line: str = "") -> None:
        super().__init__(line)
        self.number, self.line = number, line
