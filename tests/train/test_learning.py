"""A drafter learns a tiny target's own answers, through the command that users run."""

from checkpoints.unfinished import *  # noqa: F403
