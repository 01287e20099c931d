"""Conversion of N expert checkpoints into one channel-merged checkpoint, and the work on such checkpoints.

`python -m conversion` and `channel-merge` are the same command line. Each command is one file at the door: `convert`,
`add_expert`, `export`, `generate`, `push`, `report` (inspect) and `train_router`; `expert_lora` has an expert learn
more. The rooms behind them import only rooms below: `channels` and `io`; `vocabulary` and `checkpoints`; `merging`;
`hub`; `addition`; and `router`, which needs `io` and `vocabulary` only. Importing this package imports nothing heavy.
"""
