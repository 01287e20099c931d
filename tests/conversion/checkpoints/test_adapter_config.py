"""The settings of an adapter count as PEFT counts them."""

import json
import subprocess
import sys
from dataclasses import dataclass

import peft
import pytest

from conversion.checkpoints.adapter_config import AdapterConfig, changed_settings, read_adapter_config
from conversion.io.sources import Source


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


@pytest.fixture
def read(tmp_path):
    """Factory: `read(**settings)` reads the adapter config that PEFT saves of its defaults, with these settings."""

    def read(**settings):
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return read_adapter_config(Source("e", "adapter", None, tmp_path))

    return read


def test_defaults_are_no_changes(tmp_path):
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["r"] == 3 and len(values) > 20
    assert changed_settings(values) == {"r": 8}


@pytest.mark.parametrize(
    ("name", "value"),
    [("megatron_core", "elsewhere"), ("qalora_group_size", 32), ("use_qalora", True), ("not_known_yet", 1)],
)
def test_a_setting_that_is_not_the_default_is_refused(read, name, value):
    read()
    read(**{name: None})
    with pytest.raises(ValueError, match=f"e: adapter sets {name} to {value!r}, which is not supported"):
        read(**{name: value})


def test_a_new_setting_of_peft_may_have_its_default(read, monkeypatch):
    @dataclass
    class NewConfig(peft.LoraConfig):
        not_known_yet: int = 16

    monkeypatch.setattr(peft, "LoraConfig", NewConfig)
    assert read().rank == 8
    with pytest.raises(ValueError, match="e: adapter sets not_known_yet to 32, which is not supported"):
        read(not_known_yet=32)


def test_an_older_peft_saved_less(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}')
    config = read_adapter_config(Source("e", "adapter", None, tmp_path))
    assert (config.rank, config.alpha, config.modules_to_save) == (4, 6.0, ())
