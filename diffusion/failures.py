"""The base class of everything that may end a run that had started well."""


class RunFailure(Exception):
    """Said in one line, without a traceback; its message names the thing and the remedy. Whatever else ends a run is a
    defect."""
