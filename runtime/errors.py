"""The one exception for errors that the user can fix."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do. Entry points exit with code 2."""
