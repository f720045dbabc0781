"""The package's own error."""


class DataError(Exception):
    """The data are missing, unusable or not what the caller says; the message names the remedy.

    ``exit_code`` is the status that a program which stops for it should return: 78
    (``EX_CONFIG`` of sysexits.h), so that a supervisor does not try the same again.
    """

    exit_code = 78
