"""Refinement: teachers, divergence, training and evaluation of stored rows, report."""
