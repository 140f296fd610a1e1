"""Several processes of one command: start them, and read the rank of this one."""

from pertcast.processes.launch import LostProcessError, Ranks, launched, run_processes

__all__ = ["LostProcessError", "Ranks", "launched", "run_processes"]
