"""The one error that users are meant to see."""


class UserError(Exception):
    """Bad input or surroundings. The message says what is wrong, where, and what would be right, in one line each."""
