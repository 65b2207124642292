"""What runs the tasks, and what is shown of the runs."""
