"""Several processes of one command: which of them this one is, and how a command starts them by itself."""

from pertcast.processes.launch import LostProcessError, Ranks, launched, run_processes

__all__ = ["LostProcessError", "Ranks", "launched", "run_processes"]
