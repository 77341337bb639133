"""Train: the executor of gradient training, for students in any state."""

from compress.executors.train.loop import train

__all__ = ["train"]
