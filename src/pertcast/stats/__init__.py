"""Pure array functions: no file, no configuration, no global state."""
