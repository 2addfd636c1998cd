"""What happens to ranks: faults on demand, hangs, and why a rank was lost."""
