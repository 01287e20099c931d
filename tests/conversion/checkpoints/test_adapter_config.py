"""The settings of an adapter count as PEFT counts them."""

import subprocess
import sys

import pytest

from conversion.checkpoints.adapter_config import AdapterConfig


@pytest.mark.parametrize(
    ("module", "rank", "alpha"),
    [
        ("model.layers.0.self_attn.q_proj", 8, 16.0),
        ("model.layers.1.self_attn.q_proj", 2, 16.0),
        ("model.layers.11.self_attn.q_proj", 8, 16.0),
        ("model.layers.1.mlp.up_proj", 3, 5.0),
        ("model.layers.1.mlp.gate_up_proj", 8, 16.0),
        ("up_proj", 3, 5.0),
    ],
)
def test_patterns_match_ends_of_paths_and_the_first_counts(module, rank, alpha):
    config = AdapterConfig(
        rank=8,
        alpha=16.0,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 3, "mlp.up_proj": 4},
        alpha_pattern={"up_proj|down_proj": 5.0},
        use_rslora=False,
        use_dora=False,
        base_model=None,
        modules_to_save=(),
        token_indices=None,
    )
    assert (config.rank_of(module), config.scaling_of(module)) == (rank, alpha / rank)


def test_peft_is_imported_for_adapters_alone():
    code = "import sys, conversion.convert, conversion.report; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
