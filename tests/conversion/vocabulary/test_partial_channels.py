"""Merging where not all experts have a channel: rows, thresholds and groups are those of the experts that have it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion.channels.merge_methods import merge_rows
from conversion.convert import convert

from .conftest import NUM_BASE_TOKENS, UNION


def test_one_group_merges_those_that_have_the_token(llama, tmp_path):
    """K = 1, linear: a row is the mean over the experts that have the token; a token of one expert is its own row."""
    out = llama.convert(tmp_path / "out", "math", "chat", "code", grouping={"num_groups": 1})
    tensors = load_file(out / "model.safetensors")
    dense = {name: llama.dense(name).state_dict() for name in ("math", "chat", "code")}
    for module, parameter in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
        index = tensors[f"model.{module}.channel_index"].long()
        rows = tensors[f"model.{module}.rows.weight"]
        for channel in range(268):
            owners = [n for n, name in enumerate(dense) if channel in UNION[name]]
            own = [
                dense[name][f"{module}.weight"][UNION[name].index(channel)] for name in dense if channel in UNION[name]
            ]
            if owners:
                assert len({int(index[n, channel]) for n in owners}) == 1, (parameter, channel)
                torch.testing.assert_close(rows[index[owners[0], channel]], torch.stack(own).mean(0))
        assert len(rows) == len({channel for name in dense for channel in UNION[name]}) + (module != "lm_head")


@pytest.mark.parametrize("num_groups", [1, 2])
def test_trimming_counts_only_the_tokens_that_an_expert_has(llama, tmp_path, num_groups):
    """TIES: thresholds of an expert's own deltas; a token that the base lacks differs from the base's mean row."""
    names = ("math", "chat", "code")
    keys = {"merge_method": "ties", "parameters": {"density": 0.4}, "grouping": {"num_groups": num_groups}}
    out = llama.convert(tmp_path / "out", *names, **keys)
    recipe = llama.recipe(*names, **keys)
    base_rows = AutoModelForCausalLM.from_pretrained(llama.base).lm_head.weight.detach()
    base = base_rows[:NUM_BASE_TOKENS].double().mean(0).float().repeat(268, 1)
    base[UNION["math"]] = base_rows
    rows, thresholds = torch.zeros(3, 268, 24), []
    for expert, name in enumerate(names):
        own = llama.dense(name).lm_head.weight.detach()
        rows[expert, UNION[name]] = own
        magnitudes = (own - base[UNION[name]]).abs().flatten().sort(descending=True).values
        thresholds.append(magnitudes[int(0.4 * len(magnitudes)) - 1])
    tensors = load_file(out / "model.safetensors")
    index, stored = tensors["model.lm_head.channel_index"].long(), tensors["model.lm_head.rows.weight"]
    for channel in range(268):
        present = [n for n, name in enumerate(names) if channel in UNION[name]]
        groups = {}
        for expert in present:
            groups.setdefault(int(index[expert, channel]), []).append(expert)
        assert len(groups) <= num_groups
        for row, members in groups.items():
            expected = rows[members[0], channel]
            if any(not torch.equal(expected, rows[member, channel]) for member in members):
                expected = merge_rows(
                    base[channel : channel + 1],
                    rows[members, channel][:, None],
                    torch.ones(len(members)),
                    recipe.method(),
                    thresholds=torch.stack([thresholds[member] for member in members]),
                    keep=None,
                )[0]
            torch.testing.assert_close(stored[row], expected, rtol=1e-6, atol=1e-7)


def test_chunks_and_shards_change_nothing(llama, tmp_path):
    """The mean row, thresholds and groups of channels that not all have do not depend on how the data come."""
    recipe = llama.recipe(preset="paper-ties", tokenizer_source="union", grouping={"num_groups": 2})
    convert(recipe, tmp_path / "whole", progress=False)
    convert(recipe, tmp_path / "chunks", progress=False, chunk_bytes=4000)
    whole, chunks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "chunks"))
    assert whole.keys() == chunks.keys()
    assert all(torch.equal(whole[key], chunks[key]) for key in whole)


def test_a_budget_counts_the_tokens_that_experts_have(experts, tmp_path):
    """And the row that stands for those that they lack: as the files do, against the experts' own parameters."""
    out = experts.convert(tmp_path / "out", grouping={"budget": 0.5})
    tensors = load_file(out / "model.safetensors")
    stored = sum(
        value.numel()
        for name, value in tensors.items()
        if "router." not in name and not name.endswith("channel_index")
    )
    own = sum(parameter.numel() for name in experts.folders for parameter in experts.dense(name).parameters())
    assert 0 <= 0.5 * own - stored < 24  # no row would fit
