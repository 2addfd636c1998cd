"""The matrix: models, optimisers, strategies and loops, each cell on ranks against one process.

`python -m tests.matrix` trains all cells and writes docs/matrix.md. A cell is a user's program. Its ranks
are threads that call `rankwise.synchronise`; what they end with is compared with the rule of their strategy,
which `oracles` writes out in plain torch on one process.
"""
