"""What a merged checkpoint holds: parameters, rows by owner, and what merging changed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.checkpoints.checkpoint_report import inspect_checkpoint, owners_of_rows


@pytest.mark.parametrize("architecture", ["llama", "qwen2-tied", "qwen3", "gpt2-tied"])
@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_counts(tmp_path, write_checkpoint, architecture, num_experts):
    """Rows, owners and parameters are those of the checkpoint's tensors and of the experts' state dicts."""
    names = tuple(f"expert{number}" for number in range(num_experts))
    stored = write_checkpoint(tmp_path / "merged", architecture, names)
    report = inspect_checkpoint(stored.folder)
    tensors = load_file(stored.folder / "model.safetensors")
    weights = {key: value for key, value in tensors.items() if key.startswith("model.") and "channel_index" not in key}
    assert report.parameters == sum(value.numel() for value in weights.values())
    assert report.expert_parameters == sum(value.numel() for expert in stored.experts for value in expert.values())
    assert report.index_bytes == sum(value.nbytes for key, value in tensors.items() if "channel_index" in key)
    assert report.router_bytes == 4 * num_experts * (12 + 1)
    expected: dict[str, int] = {}
    for path in {key.removesuffix(".rows.weight") for key in weights if key.endswith(".rows.weight")}:
        for channel in stored.labels[path.removeprefix("model.")].T.tolist():
            for lead in set(channel):
                owners = " + ".join(name for name, label in zip(names, channel) if label == lead)
                expected[owners] = expected.get(owners, 0) + 1
    assert report.rows_by_owners == expected
    assert sum(kind.rows for kind in report.kinds) == sum(expected.values())
    for matrix in report.matrices:
        assert sum(matrix.rows_by_owner_count) == matrix.rows


def test_kinds_of_a_llama(stored):
    kinds = {kind.kind: kind for kind in inspect_checkpoint(stored.folder).kinds}
    assert list(kinds) == [
        *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("lm_head", "kept per expert"),
    ]
    assert (kinds["q_proj"].modules, kinds["q_proj"].channels) == (2, 32)
    assert kinds["kept per expert"].parameters == 3 * 5 * 12


def test_smaller_vocabularies_count_as_they_are(tmp_path, write_checkpoint):
    stored = write_checkpoint(tmp_path / "merged", vocab_sizes=(23, 20, 21))
    matrices = {matrix.path: matrix for matrix in inspect_checkpoint(stored.folder).matrices}
    for path in ("lm_head", "model.embed_tokens"):
        assert matrices[path].expert_parameters == (23 + 20 + 21) * 12


def test_row_owners():
    index = torch.tensor([[0, 1, 2], [2, 3, -1]], dtype=torch.int32)
    assert owners_of_rows(index, 5).tolist() == [1, 1, 3, 2, 0]


def test_router_state(stored):
    assert not inspect_checkpoint(stored.folder).router_trained
    tensors = load_file(stored.folder / "model.safetensors")
    tensors["router.head.weight"][0, 0] = 1
    save_file(tensors, stored.folder / "model.safetensors", metadata={"format": "pt"})
    assert inspect_checkpoint(stored.folder).router_trained


def test_index_of_a_tied_head_is_checked(tmp_path, write_checkpoint):
    stored = write_checkpoint(tmp_path / "merged", "qwen2-tied")
    tensors = load_file(stored.folder / "model.safetensors")
    tensors["model.lm_head.channel_index"][0, 0] = 999
    save_file(tensors, stored.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.channel_index holds row 999"):
        inspect_checkpoint(stored.folder)


def test_json(stored):
    report = inspect_checkpoint(stored.folder)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["share"] == report.parameters / report.expert_parameters
    assert values["rows_by_owners"] == report.rows_by_owners
    assert len(values["matrices"]) == 16


def test_relative_errors_of_kinds_and_experts(measured, write_norms):
    """Norms of several modules add up as squares do, before they are divided."""
    write_norms(measured, "model.layers.0.self_attn.q_proj", error_norms={"math": 3.0}, delta_norms={"math": 4.0})
    report = inspect_checkpoint(measured.folder)
    kinds = {kind.kind: kind.relative_errors for kind in report.kinds}
    assert kinds["lm_head"] == pytest.approx((1 / 2, 1 / 3, 1 / 4))
    assert kinds["q_proj"] == pytest.approx((1 / 2, (10 / 25) ** 0.5, 1 / 4), rel=1e-5)
    assert kinds["kept per expert"] is None
    assert report.relative_errors == pytest.approx((1 / 2, ((15 + 9) / (15 * 9 + 16)) ** 0.5, 1 / 4), rel=1e-5)


def test_a_report_of_other_experts_is_refused(measured):
    file = measured.folder / "conversion_report.json"
    file.write_text(file.read_text().replace('"math"', '"physics"'))
    with pytest.raises(ValueError, match="is no report of a conversion of instruct, math, code"):
        inspect_checkpoint(measured.folder)


def test_share_of_rows_by_owners_of_every_module(measured):
    """The JSON report has each module's rows by owner set, which add up to the whole model's."""
    report = json.loads(json.dumps(inspect_checkpoint(measured.folder).to_dict()))
    total: dict[str, int] = {}
    for matrix in report["matrices"]:
        assert sum(matrix["rows_by_owners"].values()) == matrix["rows"]
        for owners, rows in matrix["rows_by_owners"].items():
            total[owners] = total.get(owners, 0) + rows
    assert total == report["rows_by_owners"]
