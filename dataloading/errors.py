"""The package's own errors."""


class DataError(Exception):
    """The data are missing, unusable or not what the caller says; the message names the remedy.

    ``exit_code`` is the status that a program which stops for it should return: 78
    (``EX_CONFIG`` of sysexits.h), so that a supervisor does not try the same again.
    """

    exit_code = 78


class ReadError(DataError):
    """Storage did not give a file in time; the same program may go on when it does.

    ``exit_code`` is 75 (``EX_TEMPFAIL``): a supervisor should start it again.
    """

    exit_code = 75
