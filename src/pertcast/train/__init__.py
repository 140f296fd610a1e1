"""A store and an experiment in, a run out: a plain loop that can be stopped at any moment and goes on exactly."""

from pertcast.train.stage import train

__all__ = ["train"]
