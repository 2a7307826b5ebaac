"""What may end a run that had started well."""


class RunFailure(Exception):
    """Ends a run with one line and no traceback. Whatever else a run raises is a defect."""


class DeadlineExceeded(RunFailure, TimeoutError):
    """Something did not answer in time; the message says what, and which setting is the limit."""
