"""A conversion from its recipe to its merged rows: plan, memory, the two passes."""
