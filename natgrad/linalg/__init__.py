"""Matrices: blocks along a diagonal, Kronecker products, their inverses, Krylov spaces. Knows nothing of models."""
