"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. Entry points exit with code 2."""
