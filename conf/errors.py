"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, which key or file, what would work.

    Commands and workers print it as `error: <message>` and exit with code 2, without a traceback.
    """
