"""The one error that users are meant to see."""


class UserError(Exception):
    """Bad input or surroundings. The message says what is wrong, where, and what would be right, in one line each."""


def reason(error: Exception) -> str:
    """What another library's exception says, in one line."""
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
