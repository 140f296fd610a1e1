"""Models: the State Transition network, its losses, its run folder, and baselines."""
