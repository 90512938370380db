"""The one error that users are meant to see."""


class UserError(Exception):
    """Bad input or surroundings. The message says what is wrong, where, and what would be right, in one line each."""


def reason(error: Exception) -> str:
    """What another library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
