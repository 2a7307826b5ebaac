"""User names and passwords in URLs: not for people's eyes, files or other services."""

import re

PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]*@")
# A database's password may hold a slash.
USERINFO = re.compile(r"(?<=://)([^/\s]*|[^/\s:@]*:[^\s@<>\"']*)@")


def without_passwords(text: str) -> str:
    """The text with its URLs' user names and passwords left out."""
    return USERINFO.sub("", text)
