"""Neural network modules: arrays in, arrays out. No files, no configuration system."""
