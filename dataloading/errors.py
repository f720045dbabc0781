"""The package's own errors."""


class DataError(Exception):
    """The data are missing, unusable or not as configured; the message names the remedy.

    ``exit_code`` is the exit code of a program that stops for this error: 78 (``EX_CONFIG`` of
    sysexits.h), so that a supervisor does not retry.
    """

    exit_code = 78


class ReadError(DataError):
    """Storage did not deliver a file in time.

    ``exit_code`` is 75 (``EX_TEMPFAIL``): a supervisor should launch the program again.
    """

    exit_code = 75


class UndecodableError(ValueError):
    """An image cannot be used; the message is a short reason without a path."""
