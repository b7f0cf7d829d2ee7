"""The error that every reader and writer of checkpoints raises."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one line that says what to do."""
