"""State that is whole or not there: stretches that Ctrl-C waits for, seals of states, and files."""
