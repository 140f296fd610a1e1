"""What goes out: budget, controls, assembly, check and pack."""
