"""What may go wrong, said so that the reader knows what to do.

A `UserError` is bad input or a situation only the user can change: the command line prints it without a traceback
and exits with code 2. Anything else that escapes is a defect of autoseg and keeps its traceback.
"""


STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""


class UserError(Exception):
    """One clear sentence that names the file or value, and the fix.

    Args:
        what: the sentence that says what is wrong, with the offending value in it.
        fix: the sentence that says what to do about it; empty if `what` already does.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what} {fix}".strip())
        self.what = what
        self.fix = fix

    def __reduce__(self) -> tuple:  # keeps both fields when the error crosses a process boundary
        return type(self), (self.what, self.fix)


class Interrupted(Exception):
    """The user asked to stop (Ctrl-C, SIGTERM) and everything worth keeping has been saved.

    Args:
        how_to_resume: the command that continues the work.
    """

    def __init__(self, how_to_resume: str) -> None:
        super().__init__(how_to_resume)
        self.how_to_resume = how_to_resume


class EndedElsewhere(UserError):
    """Another process of the same training ended or is out of reach; it has said why itself, if it could.

    Args:
        reason: what the library that connects them said, where the trouble may be this process' own.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        super().__init__(
            f"Another process of this training has ended or cannot be reached{reason and f' ({reason})'}.",
            "What was saved is intact: start all processes again with --resume.",
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.reason,)
