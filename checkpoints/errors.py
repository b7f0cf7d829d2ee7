"""The error that every reader and writer of checkpoints raises."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line that says what to do.

    Names in damaged files stand in messages: lines are joined, other characters that cannot be printed are escaped.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        super().__init__("".join(each if each.isprintable() else repr(each)[1:-1] for each in line))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
