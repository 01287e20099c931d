"""What the first pass decides about a module, through its file and back."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from conversion.merging.grouped_module import ModuleGroups, ModuleRows

# Two experts, three channels of which the second expert lacks the last: rows of the first, of both, of the second.
GROUPS = ModuleGroups(
    channel_index=torch.tensor([[0, 2, 1], [3, 2, -1]], dtype=torch.int32),
    copied=torch.tensor([True, True, False, True]),
    num_distinct=5,
    has_fallback=True,
    delta_squares=torch.tensor([1.5, 2.5], dtype=torch.float64),
    thresholds={"embed.weight": torch.tensor([0.25, 0.5])},
)


@pytest.mark.parametrize("groups", [GROUPS, dataclasses.replace(GROUPS, has_fallback=False, thresholds={})])
def test_a_file_holds_all_of_it(groups, tmp_path):
    save_file(groups.tensors(), tmp_path / "groups.safetensors")
    loaded = ModuleGroups.load(tmp_path / "groups.safetensors")
    assert (loaded.num_distinct, loaded.has_fallback) == (groups.num_distinct, groups.has_fallback)
    assert {type(loaded.num_distinct), type(loaded.has_fallback)} == {int, bool}
    for field in ("channel_index", "copied", "delta_squares"):
        assert getattr(loaded, field).dtype == getattr(groups, field).dtype
        assert torch.equal(getattr(loaded, field), getattr(groups, field))
    assert loaded.thresholds.keys() == groups.thresholds.keys()
    assert all(torch.equal(loaded.thresholds[name], value) for name, value in groups.thresholds.items())


def test_numbers_and_blocks(tmp_path):
    rows = ModuleRows(GROUPS)
    summary = rows.summary(tmp_path / "groups.safetensors")
    assert (summary.num_rows, summary.num_merged, summary.num_distinct) == (5, 1, 5)
    assert summary.owner_counts(["math", "code"]) == {"math": 2, "math+code": 1, "code": 1}
    assert rows.channel_index("embedding").tolist() == [[0, 2, 1], [3, 2, 4]]
    assert rows.channel_index("linear").tolist() == [[0, 2, 1], [3, 2, -1]]
    blocks = [(block.members, block.start, block.channels.tolist()) for block in rows.blocks(0, 2)]
    assert blocks == [((0,), 0, [0]), ((0, 1), 2, [1]), ((1,), 3, [0])]
