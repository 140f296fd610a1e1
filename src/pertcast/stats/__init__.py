"""Pure array functions, without files, settings or global state."""
