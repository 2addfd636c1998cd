"""Seeing what a program that uses mpi4py does in MPI."""
