"""Curvature of layers, in each structure: dense, diagonal and Kronecker blocks, and the statistics that they keep."""
