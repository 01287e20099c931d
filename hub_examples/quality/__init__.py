"""The parts of the quality benchmark: sets of experts, their questions, contenders and measures."""
