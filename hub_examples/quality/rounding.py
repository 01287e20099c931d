"""Rows in int8, int4 and less, rounded to the nearest, symmetric: a view of rounded rows is the rounded view."""

from dataclasses import replace

import torch

from quality.problem import BYTES, Problem, Stored, rounded

GROUP = 32  # inputs that share a scale below int8
LARGEST = {8: 127, 4: 7, 3: 3, 2: 1}


def quantized(problem: Problem, stored: Stored, bits: int) -> Stored:
    """All matrices of a contender that stores rows: int8 with a scale a row, or less with one for 32 inputs."""
    assert stored.rows is not None
    views = [
        {name: tensor if tensor.ndim < 2 else nearest(tensor, bits) for name, tensor in view.items()}
        for view in stored.views
    ]
    saved = sum(
        rows * (BYTES * problem.base[name].shape[1] - row_bytes(problem.base[name].shape[1], bits))
        for name, rows in stored.rows.items()
    )
    return replace(stored, views=views, num_bytes=stored.num_bytes - saved, checkpoint=None)


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one row with its scales."""
    scales = 1 if bits == 8 else -(-width // GROUP)
    return -(-width * bits // 8) + BYTES * scales


def nearest(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """The float32 matrix (O, I) that the integers and their bfloat16 scales stand for."""
    groups = matrix.unflatten(1, (1, -1) if bits == 8 else (-1, GROUP))  # (O, groups, inputs of one)
    scale = rounded(groups.abs().amax(-1, keepdim=True) / LARGEST[bits]).clamp(min=1e-12)
    whole = (groups / scale).round().clamp(-LARGEST[bits], LARGEST[bits])
    return (whole * scale).flatten(1)
