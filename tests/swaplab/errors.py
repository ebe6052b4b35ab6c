"""What can go wrong in the lab itself, as opposed to in what it proves.

A workload that fails is data (a `Result` says so); these are raised when there is no result:

    LabError
      LabUnfitError       this machine cannot boot a guest; it says what to install or allow
      LabTimeoutError     the lab's limit ran out; it ends with what the guest was doing
      GuestDiedError      the guest's kernel panicked or went away while something waited for it
      CommandFailedError  a command that has to work (mkswap, nbd-client, ...) did not
"""

from __future__ import annotations


class LabError(Exception):
    """The lab failed before it could tell anything about what it was to prove."""


class LabUnfitError(LabError):
    """This machine cannot boot a guest."""


class LabTimeoutError(LabError):
    """The lab's time limit ran out."""


class GuestDiedError(LabError):
    """The guest's kernel is gone."""


class CommandFailedError(LabError):
    """A command that has to work did not."""
