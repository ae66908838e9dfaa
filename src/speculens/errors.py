"""The one error that is meant for the user's eyes, and what to quote in it of others."""

# In the words of torch's allocators and cuBLAS.
SHORT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


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


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, a device's or the machine's; allocators have no type in common."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in SHORT_OF_MEMORY))
    )
