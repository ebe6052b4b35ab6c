"""The exception tree: a class for each kind of mistake, its docstring the message.

    ZcacheError                 exit code 2
      ConfigError               3   what a user wrote in a key or an option
      MemoryFileError           4   the memory segment: missing, foreign, in use, damaged
      InUseError                5   something that belongs to a living process
      ControlError              6   the control socket: absent, silent, not ours

The docstring is a format string for the arguments; it says what is wrong and what
to do.  A subclass may be raised with a whole sentence instead when the docstring
is just "{}".
"""

from __future__ import annotations


class ZcacheError(Exception):
    """{}"""

    exit_code = 2

    def __str__(self) -> str:
        template = type(self).__doc__ or "{}"
        try:
            return template.format(*self.args)
        except (IndexError, KeyError):
            return " ".join(map(str, self.args)) or template


class ConfigError(ZcacheError):
    """{}"""

    exit_code = 3


class MemoryFileError(ZcacheError):
    """{}"""

    exit_code = 4


class InUseError(ZcacheError):
    """{}"""

    exit_code = 5


class ControlError(ZcacheError):
    """{}"""

    exit_code = 6


class AttachError(ZcacheError):
    """{}"""

    exit_code = 7
