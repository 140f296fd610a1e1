"""The submission: budget, controls, assembly, check and pack."""
