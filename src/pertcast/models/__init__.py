"""What learns: the State Transition network, its losses and its checkpoints."""
