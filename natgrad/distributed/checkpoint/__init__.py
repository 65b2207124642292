"""Checkpoints of many processes; the public names are those of `natgrad.checkpoint`."""
