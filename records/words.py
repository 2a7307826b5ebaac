"""Texts of others (prompts, names, errors) before they are shown: no control characters, and not too long."""

MOST, PROMPT = 2000, 300  # letters of an error, and of a prompt


def printable(text: str) -> str:
    """With a blank for every control character: none reaches a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def short(text: str, most: int = MOST) -> str:
    """Its beginning, and how much of it there is."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} letters)"
