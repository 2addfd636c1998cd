"""Data-parallel training over MPI, on CPUs first, that accounts for every second of every rank."""
