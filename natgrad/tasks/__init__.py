"""The problems that ``natgrad solve`` ships: one small file each, see `natgrad.tasks.problem`."""
