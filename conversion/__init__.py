"""Conversion of N expert checkpoints into one channel-merged checkpoint, and the work on such checkpoints.

`python -m conversion` and `channel-merge` are the same command line. Each command is one module with one function:
`convert`, `export`, `report` (inspect) and `train_router`. Importing this package imports nothing heavy.
"""
