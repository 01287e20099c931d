"""The N-expert modules against the plain definition, and the swap into a base architecture."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conversion.channels.row_layout import layout_rows
from modeling_channel_merged import channel_ops
from modeling_channel_merged.active_experts import ActiveExperts, activate
from modeling_channel_merged.channel_merged_layers import (
    ChannelMergedEmbedding,
    ChannelMergedLinear,
    PerExpert,
    find_modules,
    initial_channel_index,
    resize_channels,
)
from modeling_channel_merged.channel_ops import (
    ALL_ROWS_MAX_TOKENS,
    COPY_MIN_TOKENS,
    MAX_RUNS,
    reference_linear,
)

# Tokens of each batch row that reach every path of the products: see `run_path`.
FEW, MANY, COPIES = 3, ALL_ROWS_MAX_TOKENS + 1, COPY_MIN_TOKENS


def random_linear(num_experts=4, in_features=63, out_features=100, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layout = layout_rows(torch.randint(0, 2, (num_experts, out_features)))
    linear = ChannelMergedLinear(in_features, out_features, len(layout.row_channel), num_experts, bias, dtype=dtype)
    linear.channel_index.copy_(layout.channel_index)
    return linear


def reference(linear, hidden_states, expert_index):
    """The plain definition, in float64."""
    bias = None if linear.bias is None else linear.bias.double()
    return reference_linear(hidden_states.double(), linear.weight.double(), bias, linear.channel_index, expert_index)


def assert_within_twice_the_plain_error(output, linear, hidden_states, expert_index):
    """At most twice the RMS error of the plain definition in the same dtype, both against float64.

    One rounding of the result is allowed on top: at tiny sizes the plain product can be exact by luck.
    """
    truth = reference(linear, hidden_states, expert_index)
    plain = reference_linear(hidden_states, linear.weight, linear.bias, linear.channel_index, expert_index)
    rounding = torch.finfo(output.dtype).eps / 2 * rms(truth)
    assert rms(output.double() - truth) <= 2 * rms(plain.double() - truth) + rounding


def rms(values):
    return values.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, FEW, MANY, COPIES])
@pytest.mark.parametrize("experts", [[2], [1, 1], [3, 0, 3, 1, 2]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_matches_the_plain_definition(dtype, tokens, experts, bias):
    linear = random_linear(bias=bias, dtype=dtype)
    hidden_states = torch.randn(len(experts), tokens, 63).to(dtype)
    expert_index = torch.tensor(experts)
    with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
        output = linear(hidden_states)
    assert output.shape == (len(experts), tokens, 100) and output.dtype == dtype
    assert_within_twice_the_plain_error(output, linear, hidden_states, expert_index)


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (63, 1), (100, 63), (16, 2000)])
@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_linear_at_odd_sizes(in_features, out_features, num_experts):
    linear = random_linear(num_experts, in_features, out_features)
    expert_index = torch.arange(num_experts)
    for tokens in (FEW, MANY):
        hidden_states = torch.randn(num_experts, tokens, in_features)
        with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
            output = linear(hidden_states)
        assert_within_twice_the_plain_error(output, linear, hidden_states, expert_index)


@pytest.mark.parametrize("tokens", [1, 20, MANY, COPIES])
@pytest.mark.parametrize("expert", [0, 1])
def test_many_experts_with_many_runs(tokens, expert, monkeypatch):
    monkeypatch.setattr(channel_ops, "RUN_STEP", 1)
    linear = random_linear(num_experts=12)
    assert max(len(runs.slices) for runs in linear.derived.runs) > MAX_RUNS / 2
    longer = random_linear(num_experts=12, out_features=900)
    assert len(longer.derived.runs[expert].slices) > MAX_RUNS
    for layer in (linear, longer):
        hidden_states, expert_index = torch.randn(1, tokens, 63), torch.tensor([expert])
        with torch.no_grad(), activate(ActiveExperts(expert)):
            assert_within_twice_the_plain_error(layer(hidden_states), layer, hidden_states, expert_index)


@pytest.mark.parametrize("tokens", [FEW, MANY, COPIES])
@pytest.mark.parametrize("experts", [[1, 1], [3, 0, 2, 0]], ids=str)
def test_linear_gradients(tokens, experts):
    """Gradients of input, rows and biases match those of the plain definition; rows nobody read get none."""
    linear = random_linear().double()
    hidden_states = torch.randn(len(experts), tokens, 63, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(experts), tokens, 100, dtype=torch.float64)
    expert_index = torch.tensor(experts)
    tensors = (hidden_states, linear.weight, linear.bias)
    plain = reference_linear(*tensors, linear.channel_index, expert_index)
    expected = torch.autograd.grad(plain, tensors, upstream)
    with activate(ActiveExperts.from_index(expert_index)):
        actual = torch.autograd.grad(linear(hidden_states), tensors, upstream)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("experts", [[1, 1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_channels_that_an_expert_does_not_have_are_minus_infinity(experts, tokens):
    linear = random_linear(num_experts=3)
    linear.channel_index[1, 90:] = -1
    expert_index = torch.tensor(experts)
    hidden_states = torch.randn(len(experts), tokens, 63)
    with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
        output = linear(hidden_states)
    assert torch.equal(output.isneginf(), reference(linear, hidden_states, expert_index).isneginf())
    assert output[experts.index(1), :, 90:].isneginf().all() and output[experts.index(1), :, :90].isfinite().all()


def test_flattened_batch():
    """Some architectures flatten batch and tokens before a linear map."""
    linear, expert_index = random_linear(), torch.tensor([3, 0, 1])
    hidden_states = torch.randn(3, 5, 63)
    with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
        assert torch.equal(linear(hidden_states.flatten(0, 1)), linear(hidden_states).flatten(0, 1))
        with pytest.raises(RuntimeError, match="mixed batch of 3 rows"):
            linear(hidden_states.flatten(0, 1)[:-1])


class Doubled(nn.Linear):
    """Stands for a quantized or adapted layer: its forward is not the plain product."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize("experts", [[2, 2], [2, 0]], ids=str)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_rows_that_are_not_plain_are_called(experts, tokens):
    linear, expert_index = random_linear(), torch.tensor(experts)
    hidden_states = torch.randn(2, tokens, 63)
    truth = reference(linear, hidden_states, expert_index)
    linear.rows.__class__ = Doubled
    with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
        torch.testing.assert_close(linear(hidden_states).double(), 2 * truth, rtol=1e-5, atol=1e-5)


def test_hooks_on_rows_run():
    linear, calls = random_linear(), []
    linear.rows.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad(), activate(ActiveExperts(1)):
        linear(torch.randn(1, 2, 63))
    assert calls == [1]


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_rows_run(register):
    linear, calls = random_linear(), []
    getattr(linear.rows, register)(lambda *args: calls.append(1))
    with activate(ActiveExperts(1)):
        linear(torch.randn(1, 2, 63, requires_grad=True)).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [1, FEW, MANY, COPIES])
@pytest.mark.parametrize("experts", [[1, 1], [3, 0]], ids=str)
def test_autocast_gives_the_dtype_and_the_values_of_the_dense_layer(experts, tokens, gradients):
    linear, expert_index = random_linear(), torch.tensor(experts)
    hidden_states = torch.randn(2, tokens, 63)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = reference_linear(hidden_states, linear.weight, linear.bias, linear.channel_index, expert_index)
        with activate(ActiveExperts.from_index(expert_index)):
            output = linear(hidden_states)
    assert output.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(output, plain)


def test_runs_follow_the_index():
    """A new, an overwritten and a copied index are all read afresh."""
    linear, other = random_linear(seed=0), random_linear(seed=1)
    hidden_states, expert_index = torch.randn(1, 2, 63), torch.tensor([1])

    def check(linear):
        with torch.no_grad(), activate(ActiveExperts(1)):
            output = linear(hidden_states).double()
        torch.testing.assert_close(output, reference(linear, hidden_states, expert_index), rtol=1e-5, atol=1e-5)

    check(linear)
    clone = copy.deepcopy(linear)
    with torch.no_grad():
        linear.channel_index[1] = linear.channel_index[1].flip(0)
    check(linear)
    check(clone)
    linear.channel_index = clone.channel_index.clone()
    check(linear)
    linear = random_linear(seed=1)
    check(linear)
    linear.load_state_dict(other.state_dict())
    check(linear)


def test_index_out_of_range_is_named():
    linear = random_linear()
    linear.channel_index[0, 0] = linear.num_rows
    with pytest.raises(ValueError, match=rf"lm_head.channel_index holds row {linear.num_rows}.*damaged"):
        linear.check_channel_index("lm_head")
    linear.channel_index[0, 0] = -2
    with pytest.raises(ValueError, match="holds row -2"):
        linear.check_channel_index("lm_head", torch.ones_like(linear.channel_index, dtype=torch.bool))


def test_only_a_token_may_be_missing():
    linear = random_linear()
    linear.channel_index[1, 2] = -1
    may_miss = torch.zeros_like(linear.channel_index, dtype=torch.bool)
    for allowed in (None, may_miss):
        with pytest.raises(ValueError, match="holds row -1 for expert 1, channel 2"):
            linear.check_channel_index("lm_head", allowed)
    may_miss[1, 2] = True
    linear.check_channel_index("lm_head", may_miss)


@pytest.mark.parametrize("num_rows", [10, 13, 25, 30])
def test_initial_index_is_valid(num_rows):
    index = initial_channel_index(3, 10, num_rows)
    assert index.min() == 0 and index.max() == num_rows - 1
    assert all(len(row.unique()) == 10 for row in index)


def test_initial_index_of_fewer_rows_than_channels():
    """No expert has some of the tokens."""
    index = initial_channel_index(3, 10, 4)
    assert index.shape == (3, 10) and index.min() == 0 and index.max() == 3


@pytest.mark.parametrize("num_rows", [0, 31])
def test_impossible_row_count(num_rows):
    with pytest.raises(ValueError, match=f"{num_rows} rows cannot hold 10 channels of 3 experts: expected 1 to 30"):
        initial_channel_index(3, 10, num_rows)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input_ids):
        return 3 * super().forward(input_ids)


@pytest.mark.parametrize("experts", [[1, 1], [2, 0]], ids=str)
def test_embedding_looks_up_the_row_of_its_expert_and_keeps_the_base_class(experts):
    torch.manual_seed(0)
    layout = layout_rows(torch.randint(0, 3, (3, 20)))
    embedding = ChannelMergedEmbedding(ScaledEmbedding(20, 8, padding_idx=0), len(layout.row_channel), 3)
    nn.init.normal_(embedding.rows.weight)
    embedding.channel_index.copy_(layout.channel_index)
    input_ids = torch.randint(0, 20, (2, 5))
    with torch.no_grad(), activate(ActiveExperts.from_index(torch.tensor(experts))):
        output = embedding(input_ids)
    for row, expert in enumerate(experts):
        rows = embedding.channel_index[expert].long()[input_ids[row]]
        assert torch.equal(output[row], 3 * embedding.rows.weight[rows])


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(12), lambda: nn.RMSNorm(12), lambda: LlamaRMSNorm(12)])
@pytest.mark.parametrize("shape", [(4, 5, 12), (4, 5, 3, 12), (20, 12)], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_norms_of_a_mixed_batch_equal_each_experts_own(make, shape, grouped):
    torch.manual_seed(0)
    norms = PerExpert(make(), 3)
    for parameter in norms.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    expert_index = torch.tensor([2, 0, 1, 2])
    hidden_states = torch.randn(shape)
    active = ActiveExperts.from_index(expert_index) if grouped else ActiveExperts.mixed(expert_index)
    with torch.no_grad(), activate(active):
        output = norms(hidden_states)
    per_token = expert_index if shape[0] == 4 else expert_index.repeat_interleave(5)
    expected = torch.stack([norms.experts[e](row) for row, e in zip(hidden_states, per_token.tolist(), strict=True)])
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_norm_gradients_of_a_mixed_batch():
    torch.manual_seed(0)
    norms, expert_index = PerExpert(LlamaRMSNorm(12), 3).double(), torch.tensor([2, 0, 2])
    hidden_states, upstream = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    weights = [norm.weight for norm in norms.experts]
    with activate(ActiveExperts.from_index(expert_index)):
        actual = torch.autograd.grad(norms(hidden_states), weights, upstream, materialize_grads=True)
    looped = torch.stack([norms.experts[e](row) for row, e in zip(hidden_states, expert_index.tolist(), strict=True)])
    expected = torch.autograd.grad(looped, weights, upstream, materialize_grads=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_learned_positions_of_a_mixed_batch():
    torch.manual_seed(0)
    positions, expert_index = PerExpert(nn.Embedding(10, 4), 3), torch.tensor([2, 0])
    for expert in positions.experts:
        nn.init.normal_(expert.weight)
    with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
        for position_ids in (torch.arange(6)[None], torch.randint(0, 10, (2, 6))):
            output = positions(position_ids)
            for row, expert in enumerate(expert_index.tolist()):
                ids = position_ids.expand(2, -1)[row]
                assert torch.equal(output[row], positions.experts[expert].weight[ids])


def sizes(**kwargs):
    return {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **kwargs}


def test_modules_of_a_base_are_sorted():
    config = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    with torch.device("meta"):
        modules = find_modules(AutoModelForCausalLM.from_config(config))
    assert modules.channel["transformer.wte"].kind == "embedding"
    attention = modules.channel["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.in_features, attention.out_features, attention.bias) == ("conv1d", 8, 24, True)
    assert modules.channel["lm_head"].tied_to == "transformer.wte"
    assert modules.per_expert["transformer.wpe"] == ("weight",)
    assert modules.per_expert["transformer.ln_f"] == ("weight", "bias")


def test_every_parameter_is_sorted_exactly_once():
    config = OPTConfig(hidden_size=8, ffn_dim=16, word_embed_proj_dim=8, **sizes())
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(config)
    modules = find_modules(inner)
    assert not modules.channel.keys() & modules.per_expert.keys()
    paths = {name.rpartition(".")[0] for name, _ in inner.named_parameters(remove_duplicate=False)}
    assert modules.channel.keys() | modules.per_expert.keys() == paths


def test_mixture_of_experts_is_refused_by_name():
    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_key_value_heads=1, **sizes())
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="MixtralForCausalLM is not supported: model.layers.0.mlp"):
        find_modules(inner)


def test_encoder_decoder_is_refused_by_name():
    from transformers import T5ForConditionalGeneration

    with torch.device("meta"):
        inner = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=8, num_layers=1, d_ff=8, num_heads=2, d_kv=4)
        )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_modules(inner)


def test_linear_with_its_own_forward_is_refused_by_name():
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=8, intermediate_size=8, num_key_value_heads=1, **sizes())
        inner = AutoModelForCausalLM.from_config(config)
    inner.model.layers[0].mlp.up_proj.__class__ = Doubled
    with pytest.raises(ValueError, match="up_proj is a Doubled with its own forward"):
        find_modules(inner)


@pytest.mark.parametrize("size", [25, 14])
def test_resizing_keeps_the_other_channels(size):
    torch.manual_seed(0)
    layout = layout_rows(torch.randint(0, 3, (3, 20)))
    head = ChannelMergedLinear(8, 20, len(layout.row_channel), 3, True)
    head.channel_index.copy_(layout.channel_index)
    head.channel_index[1, 18:] = -1
    hidden_states, kept = torch.randn(3, 2, 8), min(size, 20)
    with torch.no_grad(), activate(ActiveExperts.from_index(torch.tensor([0, 1, 2]))):
        before, mean = head(hidden_states), head.weight.mean(0)
        resize_channels(head, size, None)
        after = head(hidden_states)
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=1e-6, atol=1e-6)
    assert after.shape[-1] == size
    head.check_channel_index("head", head.channel_index == -1)
    assert torch.equal(head.weight[head.channel_index[0, 20:].long()], mean.expand(size - kept, -1))
