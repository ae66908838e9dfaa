"""The one error that is meant for the user's eyes, and what to quote in it of others."""


class UserError(Exception):
    """One clear sentence: what is wrong, and what to do. The command line prints it and exits with status 2."""


def lacking(who: str, what: str, extra: str) -> UserError:
    """What to say where an optional dependency is missing."""
    return UserError(
        f"{who} {what}: install speculens with its extra {extra}, in a checkout by pip install '.[{extra}]'."
    )


def first_line(error: BaseException) -> str:
    """The first line of a message that may be a page; the error's name where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
