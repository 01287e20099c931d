"""Grouping, merge methods, the rows' order and errors: tensors in, tensors out, no files."""
