"""A router's arguments, data, features, metrics and report."""
