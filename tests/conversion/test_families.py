"""Every supported family through the whole pipeline: convert, load, route, generate, export; invariants 1, 3, 4 and 5.

Three tiny random experts of each family are converted twice: with three groups, which keeps every expert exactly, and
with two, which merges. What cannot be converted is refused by name before anything is written.
"""

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from conversion.checkpoints.tensor_names import by_parameter_name
from conversion.convert import convert
from conversion.export import export_expert
from conversion.merging.recipe import Recipe, parse_recipe
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM

NAMES = ("instruct", "math", "code")
VOCAB_SIZE = 101
LENGTH = 7
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 4  # shorter than the prompts, so that it matters
# Six prompts (6, 7) without special tokens.
PROMPTS = torch.randint(3, VOCAB_SIZE, (6, LENGTH), generator=torch.Generator().manual_seed(1))


def config_of(name: str, without: tuple[str, ...] = (), **values) -> Callable[[], PreTrainedConfig]:
    """Factory of a tiny config of the class `name`; `without` names sizes that the class does not know."""
    sizes = {key: value for key, value in SIZES.items() if key not in without}
    return lambda: getattr(transformers, name)(**sizes | values)


NO_GROUPS = ("num_key_value_heads",)
FAMILIES = {
    "llama": config_of("LlamaConfig"),
    "llama-biases-tied": config_of("LlamaConfig", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": config_of("MistralConfig", sliding_window=WINDOW),
    "qwen2": config_of("Qwen2Config", tie_word_embeddings=True),
    "qwen3": config_of("Qwen3Config", head_dim=12),
    "gemma": config_of("GemmaConfig", head_dim=8),
    "gemma2": config_of(
        "Gemma2Config",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": config_of(
        "Gemma3TextConfig",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": config_of("PhiConfig", partial_rotary_factor=0.5),
    "phi-qk-layernorm": config_of("PhiConfig", partial_rotary_factor=0.5, qk_layernorm=True),
    "phi3": config_of("Phi3Config"),
    "gpt_neox": config_of("GPTNeoXConfig", NO_GROUPS, rotary_pct=0.5),
    "gpt_neox-sequential-tied": config_of(
        "GPTNeoXConfig", NO_GROUPS, use_parallel_residual=False, tie_word_embeddings=True
    ),
    "gpt2": config_of("GPT2Config", NO_GROUPS, n_inner=44),
    "falcon": config_of("FalconConfig", NO_GROUPS),
    "falcon-multi-head": config_of("FalconConfig", NO_GROUPS, multi_query=False, parallel_attn=False, bias=True),
    "falcon-new": config_of("FalconConfig", NO_GROUPS, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": config_of("FalconConfig", NO_GROUPS, alibi=True),
    "olmo2": config_of("Olmo2Config"),
    "granite": config_of(
        "GraniteConfig",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "starcoder2": config_of("Starcoder2Config", sliding_window=WINDOW),
    "stablelm": config_of("StableLmConfig", partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm-qk-layernorm": config_of("StableLmConfig", partial_rotary_factor=0.5, qk_layernorm=True),
    "stablelm-parallel": config_of("StableLmConfig", partial_rotary_factor=0.25, use_parallel_residual=True),
    "smollm3": config_of("SmolLM3Config", no_rope_layers=[1, 0]),
    "cohere": config_of("CohereConfig", logit_scale=0.5),
    "cohere-qk-norm": config_of("CohereConfig", logit_scale=0.5, use_qk_norm=True),
    "opt": config_of("OPTConfig", NO_GROUPS, ffn_dim=44, word_embed_proj_dim=32),
    "opt-projected-post-norm": config_of(
        "OPTConfig", NO_GROUPS, ffn_dim=44, word_embed_proj_dim=20, do_layer_norm_before=False
    ),
}


def random_base(config: PreTrainedConfig) -> PreTrainedModel:
    """Weights of a size that keeps signals alive, norms around their neutral value, biases around zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.15 * noise)
    return model


def random_expert(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A fine-tune: every parameter changed, but a fifth of the rows of each matrix left as they are."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            delta = 0.05 * torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                delta[torch.rand(len(delta), generator=generator) < 0.2] = 0
            parameter.add_(delta)
    return expert


def recipe_of(folder: Path, names: tuple[str, ...], **keys) -> Recipe:
    experts = [{"name": name, "model": str(folder / name)} for name in names]
    return parse_recipe({"base_model": str(folder / "base"), "experts": experts, **keys})


@dataclass
class Family:
    """The experts of one family on disk, converted with three groups (`exact`) and with two (`merged`)."""

    folder: Path
    config: Callable[[], PreTrainedConfig]

    @cached_property
    def experts(self) -> list[PreTrainedModel]:
        base = random_base(self.config())
        experts = [random_expert(base, seed) for seed in range(1, len(NAMES) + 1)]
        for name, model in zip(("base", *NAMES), (base, *experts)):
            model.save_pretrained(self.folder / name)
        return experts

    def _convert(self, out: str, num_groups: int) -> Path:
        assert self.experts
        recipe = recipe_of(self.folder, NAMES, preset="paper-ties", grouping={"num_groups": num_groups})
        convert(recipe, self.folder / out, progress=False)
        return self.folder / out

    @cached_property
    def exact(self) -> Path:
        return self._convert("exact", len(NAMES))

    @cached_property
    def merged(self) -> Path:
        return self._convert("merged", 2)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The merged experts, with a router whose weights are made up so that it tells prompts apart."""
        model = AutoModelForCausalLM.from_pretrained(self.merged)
        head = model.router.head
        head.weight.data = 9 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
        head.bias.data -= model.route(PROMPTS).logits.mean(0)
        return model

    @cached_property
    def routed(self) -> Path:
        """The same, saved again by Transformers."""
        self.model.save_pretrained(self.folder / "routed")
        return self.folder / "routed"

    def exported(self, checkpoint: Path, name: str) -> Path:
        out = self.folder / f"{checkpoint.name}-{name}"
        if not out.exists():
            export_expert(checkpoint, name, out)
        return out


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Every family by its id; made when first asked for, once for all tests of this file."""
    return {name: Family(tmp_path_factory.mktemp(name), config) for name, config in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(families, request) -> Family:
    return families[request.param]


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


class Dense:
    """The plain class's logits of one expert for the prompts, and how far from float64 they are."""

    def __init__(self, model: PreTrainedModel):
        with torch.no_grad():
            logits = model.eval()(PROMPTS).logits
            self.truth = copy.deepcopy(model).double()(PROMPTS).logits
        self.error = rms(logits - self.truth)
        assert self.error < 1e-5 * rms(self.truth)  # else the bound would say nothing

    def check(self, logits: torch.Tensor, rows: int | slice = slice(None)) -> None:
        """At most twice the plain class's own error, both against float64."""
        assert rms(logits - self.truth[rows]) <= 2 * self.error


def test_unmerged_experts_come_back_exactly(family):
    """Invariant 1: as many groups as experts; the export is the expert's checkpoint, the logits are the expert's."""
    model = AutoModelForCausalLM.from_pretrained(family.exact)
    for name, expert in zip(NAMES, family.experts):
        before = load_file(family.folder / name / "model.safetensors")
        after = load_file(family.exported(family.exact, name) / "model.safetensors")
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value), key
        with torch.no_grad():
            Dense(expert).check(model(PROMPTS, expert_index=name).logits)


def test_exports_and_mixed_batches_agree(family):
    """Invariants 3 and 4: exported experts, one expert alone and mixed batches in any order and padding agree."""
    model, experts, order = family.model, [0, 1, 2, 2, 0, 1], [3, 1, 0, 5, 4, 2]
    padding = PROMPTS.new_zeros(len(PROMPTS), 3)
    left, right = torch.cat([padding, PROMPTS], 1), torch.cat([PROMPTS, padding], 1)
    mask = (left != 0).long()
    has_positions = "position_ids" in inspect.signature(model.model.forward).parameters  # else they are the mask's
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if has_positions else {}
    with torch.no_grad():
        mixed = {
            "in order": model(PROMPTS, expert_index=experts).logits,
            "shuffled": model(PROMPTS[order], expert_index=[experts[row] for row in order]).logits[
                torch.tensor(order).argsort()
            ],
            "left": model(left, attention_mask=mask, expert_index=experts, **positions).logits[:, 3:],
            "right": model(right, attention_mask=(right != 0).long(), expert_index=experts).logits[:, :LENGTH],
        }
    for expert, name in enumerate(NAMES):
        plain, info = AutoModelForCausalLM.from_pretrained(
            family.exported(family.merged, name), output_loading_info=True
        )
        assert not any(info.values()), info
        dense = Dense(plain)
        with torch.no_grad():
            dense.check(model(PROMPTS, expert_index=name).logits)
        for logits in mixed.values():
            for row in range(len(PROMPTS)):
                if experts[row] == expert:
                    dense.check(logits[row], row)


def test_routes_and_generates(family):
    """Each prompt goes to one expert whatever the padding, and continues as that expert alone would continue it."""
    model, short = family.model, PROMPTS[:, :4]
    prompts = torch.cat([torch.cat([short.new_zeros(len(short), 3), short], 1), PROMPTS])
    mask = (prompts != 0).long()
    options = {"max_new_tokens": 4, "do_sample": False}
    routing = model.route(prompts, mask)
    chosen = routing.expert_index
    assert len(chosen.unique()) > 1
    alone = torch.cat([model.route(part).logits for part in (short, PROMPTS)])
    torch.testing.assert_close(routing.logits, alone, rtol=1e-4, atol=1e-4)
    generated = model.generate(prompts, attention_mask=mask, **options)
    for expert in chosen.unique().tolist():
        plain = AutoModelForCausalLM.from_pretrained(family.exported(family.merged, NAMES[expert]))
        for row in (chosen == expert).nonzero()[:, 0].tolist():
            prompt = prompts[[row]][:, mask[row].bool()]
            expected = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert torch.equal(generated[row, -4:], expected[0, -4:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_reads_decoder_blocks(family):
    """As many experts as blocks: the copies of a module that is kept per expert are not taken for the blocks."""
    text_config = FAMILIES[family]()
    names = [f"expert{number}" for number in range(text_config.num_hidden_layers)]
    with torch.device("meta"):
        model = ChannelMergedForCausalLM(ChannelMergedConfig(text_config=text_config, expert_names=names))
    blocks = {type(block).__name__ for block in model.decoder_blocks()}
    assert len(blocks) == 1 and blocks.pop().endswith(("Layer", "Block"))


FRESH_PROCESS = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM

prompts = torch.tensor(json.loads(sys.argv[2]))
results = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output, hidden = model(prompts), headless(prompts)
    assert torch.equal(hidden.expert_index, output.expert_index)
    results[name] = (output.expert_index, output.router_logits, output.logits, hidden.last_hidden_state)
torch.save(results, sys.argv[3])
"""


def run_with_hidden_states(model: PreTrainedModel):
    """Output for the prompts, and what its head was given: (6, 7, H)."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        output = model(PROMPTS)
    hook.remove()
    return output, seen[0]


@pytest.mark.slow
def test_saved_models_load_without_this_package(families, tmp_path, without_package):
    """Invariant 5: converted, loaded, saved, loaded in a fresh offline process: the same logits and routing."""
    folders = {name: str(family.routed) for name, family in families.items()}
    command = [
        sys.executable,
        "-c",
        without_package + FRESH_PROCESS,
        json.dumps(folders),
        json.dumps(PROMPTS.tolist()),
    ]
    done = subprocess.run(
        [*command, tmp_path / "results.pt"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == FAMILIES.keys()
    for name, (expert_index, *values) in results.items():
        here, hidden_states = run_with_hidden_states(families[name].model)
        assert torch.equal(expert_index, here.expert_index), name
        for value, expected in zip(values, (here.router_logits, here.logits, hidden_states), strict=True):
            assert rms(value - expected) <= 1e-5 * rms(expected), name


REFUSED = {
    "mixtral": (
        config_of("MixtralConfig", num_local_experts=4),
        r"mixtral is a mixture of experts \(num_experts is 4\)",
    ),
    "qwen2_moe": (
        config_of("Qwen2MoeConfig", num_experts=4),
        r"qwen2_moe is a mixture of experts \(num_experts is 4\)",
    ),
    "deepseek_v3": (config_of("DeepseekV3Config", n_routed_experts=4), "deepseek_v3 is a mixture of experts"),
    "gpt_oss": (config_of("GptOssConfig", num_local_experts=4), "gpt_oss is a mixture of experts"),
    "t5": (config_of("T5Config", NO_GROUPS), "t5 is an encoder-decoder, expected a decoder-only"),
    "bart": (config_of("BartConfig", NO_GROUPS), "bart is an encoder-decoder, expected a decoder-only"),
    "bert": (config_of("BertConfig", NO_GROUPS), "BertLMHeadModel is not supported: cls.predictions"),
    "vit": (config_of("ViTConfig", NO_GROUPS), "vit has no causal language model"),
    "llava": (lambda: transformers.LlavaConfig(), "nests its language model in a larger one"),
    "mamba": (config_of("MambaConfig", NO_GROUPS), "MambaForCausalLM is not supported: .*state-space"),
    "rwkv": (config_of("RwkvConfig", NO_GROUPS), "RwkvForCausalLM is not supported: .*recurrent"),
    "jamba": (config_of("JambaConfig", num_experts=1), "JambaForCausalLM is not supported: .*mamba"),
    "lfm2": (
        config_of("Lfm2Config", layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM is not supported: .*convolution",
    ),
    "diffllama": (config_of("DiffLlamaConfig"), "DiffLlamaForCausalLM is not supported: .*lambda_k1"),
    "blenderbot-decoder": (
        config_of("BlenderbotSmallConfig", NO_GROUPS, is_encoder_decoder=False, d_model=32, decoder_layers=3),
        "BlenderbotSmallForCausalLM has no list of",
    ),
    "openai-gpt": (
        config_of("OpenAIGPTConfig", NO_GROUPS),
        "OpenAIGPTLMHeadModel is not supported: it has no key-value",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(family, tmp_path):
    """Before any weights are looked at, and before anything is written."""
    make, message = REFUSED[family]
    for name in ("base", "a", "b"):
        make().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        convert(recipe_of(tmp_path, ("a", "b")), tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    """An architecture that is no part of Transformers is refused, and its code left alone."""
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "homemade.Config"}}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "homemade.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ValueError, match="base_model: .*'homemade' is code of its own .* never run"):
        convert(recipe_of(tmp_path, ("a", "b")), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_tensors_that_transformers_computes_are_refused():
    """A converter of the loader does more than rename; a copy under the new name would be wrong."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("MixtralConfig", num_local_experts=2)())
    with pytest.raises(ValueError, match="MixtralForCausalLM is not supported: Transformers computes"):
        by_parameter_name(model, {"model.layers.0.block_sparse_moe.experts.0.w1.weight": None})


def test_a_name_that_means_another_one_is_refused():
    """GPT-NeoX stores its head as embed_out and calls it lm_head; a checkpoint with both is ambiguous."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["gpt_neox"]())
    assert by_parameter_name(model, {"embed_out.weight": 1}) == {"lm_head.weight": 1}
    with pytest.raises(ValueError, match="embed_out.weight and lm_head.weight are both lm_head.weight of GPTNeoX"):
        by_parameter_name(model, {"embed_out.weight": 1, "lm_head.weight": 2})
