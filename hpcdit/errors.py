"""The ways a run can end other than well, each with its exit code."""


class InputError(Exception):
    """Bad input or configuration. One line for the user; found before anything expensive; exit code 2."""

    exit_code = 2


class VideoError(Exception):
    """One video cannot be made (not a number, no picture); the others go on; exit code 3 at the end."""

    exit_code = 3


class BrokenRun(Exception):
    """The run cannot go on, for a reason that one line tells; exit code 4. The same command resumes it."""

    exit_code = 4


class PeerLost(BrokenRun):
    """A rank gave no sign of life within `transport.timeout_s` while another waited for it."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1) and can be resumed; exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75
