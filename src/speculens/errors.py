"""The one error that is meant for the user's eyes."""


class UserError(Exception):
    """One clear sentence: what is wrong, and what to do. The command line prints it and exits with status 2."""
