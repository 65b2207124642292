"""The optimizer, and the step rules that say how far to go."""
