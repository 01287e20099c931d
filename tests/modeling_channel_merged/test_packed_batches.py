"""Packed batches: an expert for each token of (B, T), as several queries in one row."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conversion.channels.row_layout import layout_rows
from modeling_channel_merged import ChannelMergedModel, channel_kernels
from modeling_channel_merged.active_experts import ActiveExperts, activate
from modeling_channel_merged.channel_merged_layers import ChannelMergedEmbedding, ChannelMergedLinear, PerExpert
from modeling_channel_merged.channel_ops import ALL_ROWS_MAX_TOKENS, reference_linear

from .conftest import CONFIGS, SIZES, random_model

FAMILIES = CONFIGS | {
    "gpt2": lambda: GPT2Config(vocab_size=99, n_embd=48, n_layer=2, n_head=4, n_positions=32),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=12),  # norms of heads that stand before the tokens
}
FEW, MANY = 9, ALL_ROWS_MAX_TOKENS + 3


def experts_of(rows: int, tokens: int, num_experts: int = 3, seed: int = 0) -> torch.LongTensor:
    """(rows, tokens) experts in no order, all of them there."""
    index = torch.arange(rows * tokens) % num_experts
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))].view(rows, tokens)


def forms(expert_index) -> list[ActiveExperts]:
    """Read on the host, and left on the device."""
    return [ActiveExperts.from_index(expert_index), ActiveExperts.mixed(expert_index)]


def random_linear(num_experts=3, in_features=33, out_features=50, dtype=torch.float32):
    torch.manual_seed(0)
    layout = layout_rows(torch.randint(0, 2, (num_experts, out_features)))
    linear = ChannelMergedLinear(in_features, out_features, len(layout.row_channel), num_experts, True, dtype=dtype)
    linear.channel_index.copy_(layout.channel_index)
    return linear


def plain(linear, hidden_states, expert_index):
    """Each token by the plain definition."""
    tokens = hidden_states.flatten(0, 1)
    output = reference_linear(tokens, linear.weight, linear.bias, linear.channel_index, expert_index.flatten())
    return output.unflatten(0, expert_index.shape)


class TestActiveExperts:
    def test_tokens_are_ordered_by_expert(self):
        active = ActiveExperts.from_index(torch.tensor([[2, 0, 2], [1, 0, 2]]))
        assert active.expert is None and active.packed == (2, 3)
        assert active.expert_index.tolist() == [2, 0, 2, 1, 0, 2]
        assert active.order.tolist() == [1, 4, 3, 0, 2, 5] and active.counts == ((0, 2), (1, 1), (2, 3))

    def test_tokens_of_one_expert_are_a_batch_of_one(self):
        active = ActiveExperts.from_index(torch.full((1, 5), 2))
        assert active.expert == 2 and active.packed is None

    @pytest.mark.parametrize(("kept", "experts"), [(3, [0, 1, 1]), (torch.tensor([3, 0]), [1, 2])], ids=str)
    def test_the_experts_that_reach_the_head(self, kept, experts):
        active = ActiveExperts.from_index(torch.tensor([[2, 0, 1, 1]])).keeping(kept)
        assert active.kept.expert_index.tolist() == experts
        assert active.keeping(1) is active

    def test_all_tokens_reach_the_head_unless_it_is_said(self):
        active = ActiveExperts.from_index(torch.tensor([[2, 0]]))
        assert active.keeping(0) is active
        batch = ActiveExperts.from_index(torch.tensor([2, 0]))
        assert batch.keeping(1) is batch


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(1, FEW), (1, MANY), (3, FEW), (2, MANY)], ids=str)
    @pytest.mark.parametrize("missing", [False, True])
    def test_each_token_is_its_experts(self, dtype, shape, missing):
        linear, expert_index = random_linear(dtype=dtype), experts_of(*shape)
        if missing:
            linear.channel_index[1, 40:] = -1
        hidden_states = torch.randn(*shape, 33).to(dtype)
        expected = plain(linear, hidden_states, expert_index)
        for active in forms(expert_index):
            with torch.no_grad(), activate(active):
                output, flat = linear(hidden_states), linear(hidden_states.flatten(0, 1))
            torch.testing.assert_close(output, expected)
            assert torch.equal(flat, output.flatten(0, 1))

    @pytest.mark.parametrize("tokens", [FEW, MANY])
    def test_gradients(self, tokens):
        linear, expert_index = random_linear().double(), experts_of(1, tokens)
        hidden_states = torch.randn(1, tokens, 33, dtype=torch.float64, requires_grad=True)
        tensors = (hidden_states, linear.weight, linear.bias)
        upstream = torch.randn(1, tokens, 50, dtype=torch.float64)
        expected = torch.autograd.grad(plain(linear, hidden_states, expert_index), tensors, upstream)
        for active in forms(expert_index):
            with activate(active):
                actual = torch.autograd.grad(linear(hidden_states), tensors, upstream)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs)

    def test_rows_that_are_not_plain_are_called(self):
        linear, expert_index, calls = random_linear(), experts_of(2, FEW), []
        linear.rows.register_forward_hook(lambda *args: calls.append(1))
        hidden_states = torch.randn(2, FEW, 33)
        with torch.no_grad(), activate(ActiveExperts.from_index(expert_index)):
            torch.testing.assert_close(linear(hidden_states), plain(linear, hidden_states, expert_index))
        assert calls == [1]

    def test_the_kernel_is_given_the_expert_of_each_token(self, monkeypatch):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        monkeypatch.setattr(channel_kernels, "KERNEL_DEVICES", (device,))
        calls, kernel = [], channel_kernels.kernel_linear
        monkeypatch.setattr(
            "modeling_channel_merged.channel_merged_layers.kernel_linear",
            lambda *args: calls.append(args[0].shape[1]) or kernel(*args),
        )
        linear, kept = random_linear().to(device), torch.tensor([3, 1], device=device)
        for shape in ((1, FEW), (2, FEW), (1, MANY)):
            expert_index, hidden_states = experts_of(*shape).to(device), torch.randn(*shape, 33, device=device)
            expected = plain(linear, hidden_states, expert_index)
            for active in forms(expert_index):
                with torch.no_grad(), activate(active):
                    torch.testing.assert_close(linear(hidden_states), expected)
            linear.is_head = True
            with torch.no_grad(), activate(active.keeping(kept)):
                torch.testing.assert_close(linear(hidden_states[:, kept]), expected[:, kept])
            linear.is_head = False
        assert calls == [FEW, FEW, 2, FEW, FEW, 2, 2]

    def test_tokens_that_do_not_fit_are_an_error(self):
        with torch.no_grad(), activate(ActiveExperts.from_index(experts_of(1, FEW))):
            with pytest.raises(RuntimeError, match=r"packed batch of \(1, 9\) tokens reached a layer"):
                random_linear()(torch.randn(1, FEW + 1, 33))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(12), lambda: LlamaRMSNorm(12)])
@pytest.mark.parametrize("shape", [(1, 7, 12), (2, 7, 12), (2, 7, 3, 12), (14, 12), (2, 1, 12), (1, 1, 12)], ids=str)
def test_norms(make, shape):
    torch.manual_seed(0)
    norms = PerExpert(make(), 3)
    for parameter in norms.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    expert_index = experts_of(2, 7) if shape == (14, 12) else experts_of(*shape[:2])
    hidden_states = torch.randn(shape)
    tokens = hidden_states if shape == (14, 12) else hidden_states.flatten(0, 1)
    expected = torch.stack([norms.experts[e](token) for token, e in zip(tokens, expert_index.flatten().tolist())])
    for active in forms(expert_index):
        with torch.no_grad(), activate(active):
            torch.testing.assert_close(norms(hidden_states), expected.view(shape))


@pytest.mark.parametrize("heads", [3, 7])
def test_norms_of_heads_that_stand_before_the_tokens(heads):
    """(B, heads, T, d), as some architectures norm queries and keys; also with as many tokens as heads."""
    torch.manual_seed(0)
    norms, expert_index = PerExpert(LlamaRMSNorm(12), 3), experts_of(2, 7)
    for parameter in norms.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    hidden_states = torch.randn(2, 7, heads, 12)
    for active in forms(expert_index):
        with torch.no_grad(), activate(active):
            expected = norms(hidden_states)
            torch.testing.assert_close(norms(hidden_states.transpose(1, 2)), expected.transpose(1, 2))


@pytest.mark.parametrize("rows", [1, 2])
def test_embeddings_and_learned_positions(rows):
    torch.manual_seed(0)
    layout = layout_rows(torch.randint(0, 3, (3, 20)))
    embedding = ChannelMergedEmbedding(nn.Embedding(20, 8), len(layout.row_channel), 3)
    nn.init.normal_(embedding.rows.weight)
    embedding.channel_index.copy_(layout.channel_index)
    positions = PerExpert(nn.Embedding(10, 8), 3)
    for expert in positions.experts:
        nn.init.normal_(expert.weight)
    expert_index, input_ids = experts_of(rows, 6), torch.randint(0, 20, (rows, 6))
    stored = embedding.channel_index.long()[expert_index, input_ids]
    for active in forms(expert_index):
        with torch.no_grad(), activate(active):
            assert torch.equal(embedding(input_ids), embedding.rows.weight[stored])
            for position_ids in (torch.arange(6)[None], torch.randint(0, 10, (rows, 6))):
                expected = torch.stack([expert.weight for expert in positions.experts])
                expected = expected[expert_index, position_ids.expand(rows, -1)]
                assert torch.equal(positions(position_ids), expected)


def packed(segments, experts) -> dict:
    """Queries as one row: their tokens, positions that restart, and the expert of each token."""
    lengths = torch.tensor([len(segment) for segment in segments])
    return {
        "input_ids": torch.cat(segments)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "expert_index": torch.tensor(experts).repeat_interleave(lengths)[None],
    }


@pytest.fixture
def segments(prompts):
    """Four queries of 3 to 31 tokens; together more than are multiplied by all rows."""
    torch.manual_seed(2)
    return [prompts[0, :3], prompts[1], torch.randint(3, 99, (31,)), torch.randint(3, 99, (28,))]


class TestForward:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("count", [2, 4])
    @torch.no_grad()
    def test_packed_queries_are_what_each_is_alone(self, family, count, segments):
        model, segments, experts = random_model(FAMILIES[family](), 3), segments[:count], [2, 0, 2, 1][:count]
        inputs = packed(segments, experts)
        output = model(**inputs)
        assert output.past_key_values is None and torch.equal(output.expert_index, inputs["expert_index"])
        alone = [model(segment[None], expert_index=e).logits[0] for segment, e in zip(segments, experts, strict=True)]
        torch.testing.assert_close(output.logits[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
        last = inputs["position_ids"][0].diff(append=torch.tensor([0])).ne(1).nonzero()[:, 0]
        kept = model(**inputs, logits_to_keep=last).logits[0]
        torch.testing.assert_close(kept, torch.stack([logits[-1] for logits in alone]), rtol=1e-4, atol=1e-4)
        newest = model(**inputs, logits_to_keep=2).logits[0]
        torch.testing.assert_close(newest, alone[-1][-2:], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_rows_of_one_expert_each_are_a_mixed_batch(self, llama_model, prompts):
        expert_index = torch.tensor([2, 0, 1])
        output = llama_model(prompts, expert_index=expert_index[:, None].expand(-1, 7))
        torch.testing.assert_close(output.logits, llama_model(prompts, expert_index=expert_index).logits)

    @torch.no_grad()
    def test_without_a_head(self, llama_model, segments, tmp_path):
        llama_model.save_pretrained(tmp_path)
        model, inputs = ChannelMergedModel.from_pretrained(tmp_path).eval(), packed(segments, [2, 0, 2, 1])
        states = model(**inputs).last_hidden_state
        alone = [
            model(segment[None], expert_index=e).last_hidden_state[0] for segment, e in zip(segments, [2, 0, 2, 1])
        ]
        torch.testing.assert_close(states[0], torch.cat(alone), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_tokens_that_an_expert_does_not_have(self, segments):
        """Also where the base architecture makes a number of -inf, and where only some tokens reach the head."""
        for text_config in (CONFIGS["llama"](), Gemma2Config(**SIZES, head_dim=12)):
            model = random_model(text_config, 3)
            model.set_attn_implementation("eager")
            head = model.get_output_embeddings()
            index = head.channel_index.clone()
            index[1, 90:] = -1
            head.channel_index = index
            inputs = packed(segments[:2], [1, 0])
            missing = model(**inputs).logits[0].isneginf()
            assert missing[:3, 90:].all() and missing.sum() == 3 * 9
            kept = model(**inputs, logits_to_keep=torch.tensor([9, 2])).logits[0].isneginf()
            assert not kept[0].any() and kept[1, 90:].all()

    @torch.no_grad()
    def test_one_graph_for_all_ways_to_pack(self, segments):
        torch._dynamo.reset()
        model = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), 3)
        step = torch.compile(model, backend="eager", fullgraph=True)
        inputs = packed(segments[:2], [2, 0])
        for experts in ([2, 0], [1, 2], [0, 0]):
            inputs["expert_index"] = packed(segments[:2], experts)["expert_index"]
            with torch._dynamo.config.patch(error_on_recompile=experts != [2, 0]):
                logits = step(**inputs, use_cache=False).logits
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)

    def test_training(self, llama_model, segments):
        """The loss of packed queries reaches the rows of each one's expert."""
        inputs = packed(segments[:2], [2, 0])
        llama_model(**inputs, labels=inputs["input_ids"]).loss.backward()
        norm = llama_model.model.model.norm
        assert norm.experts[0].weight.grad is not None and norm.experts[2].weight.grad is not None
        assert norm.experts[1].weight.grad is None

    @pytest.mark.parametrize(
        ("expert_index", "problem"),
        [
            (torch.zeros(3, 6, dtype=torch.int64), r"shape \(3, 6\), expected .* \(3, 7\)"),
            (torch.zeros(3, 7), "must be an integer tensor, got torch.float32"),
            (torch.full((3, 7), 3), "expert index 3 is out of range: this model has 3 experts"),
            (torch.full((3, 7), -1), "expert index -1 is out of range"),
        ],
    )
    def test_experts_that_do_not_fit(self, llama_model, prompts, expert_index, problem):
        with pytest.raises(ValueError, match=problem):
            llama_model(prompts, expert_index=expert_index)

    def test_a_cache_is_one_experts(self, llama_model, prompts):
        expert_index = experts_of(3, 7)
        cache = llama_model(prompts, expert_index=1, use_cache=True).past_key_values
        for options in ({"use_cache": True}, {"past_key_values": cache}):
            with pytest.raises(
                ValueError, match=r"the expert of each token, \(B, T\), and a cache holds one expert's"
            ):
                llama_model(prompts, expert_index=expert_index, **options)
