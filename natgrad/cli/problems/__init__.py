"""The problems that `natgrad solve` ships."""
