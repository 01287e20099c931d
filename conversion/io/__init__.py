"""Where models lie and how their files are read and written: sources, weights, staged folders, journal. No models."""
