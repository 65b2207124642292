"""Losses read as likelihoods: their outputs, draws, roots and masses."""
