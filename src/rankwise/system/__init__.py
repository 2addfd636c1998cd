"""The operating system: processes, cores, files, signals, and users' own code by name."""
