"""The problems that the command line ships."""
