"""What may end a run that had started well."""


class RunFailure(Exception):
    """Ends a run with one line and no traceback. Whatever else a run raises is a defect."""


class ServiceFailed(RunFailure):
    """A service that a reward asks is at fault, and no picture: the run ends, and nothing is set aside."""


class DeadlineExceeded(RunFailure, TimeoutError):
    """Something did not answer in time; the message says what, and which setting is the limit."""
