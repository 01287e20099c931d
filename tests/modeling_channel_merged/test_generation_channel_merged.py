"""Generation: each prompt as the dense model of its expert continues it, routing by other text, caches of others."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma2Config, PreTrainedTokenizerFast, Qwen2Config, StaticCache, TextStreamer

from modeling_channel_merged import ChannelMergedForCausalLM

from .conftest import CONFIGS, GREEDY, SIZES, dense_expert, left_padded, random_model


def words(model: ChannelMergedForCausalLM) -> torch.LongTensor:
    """(N,) one token for each expert, which the router sends to it."""
    tokens = torch.arange(3, 99)
    chosen = model.route(tokens[:, None]).expert_index
    return torch.stack([tokens[chosen == expert][0] for expert in range(model.config.num_experts)])


def count_tokens(module, counts):
    """Record how many columns each pass through a module has."""
    module.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append((args or tuple(kwargs.values()))[0].shape[1]), with_kwargs=True
    )


def test_routed_mixed_batch_generates_what_each_prompt_does_alone(text_config, prompts):
    model = random_model(text_config, 3)
    output = model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.expert_index, model.route(prompts).expert_index)
    assert output.router_logits.shape == (3, 3)
    for row, expert in enumerate(output.expert_index.tolist()):
        alone = model.generate(prompts[row : row + 1], expert_index=expert, **GREEDY)
        dense = dense_expert(model, expert).generate(prompts[row : row + 1], **GREEDY)
        assert torch.equal(output.sequences[row : row + 1, : alone.shape[1]], alone)
        assert torch.equal(alone, dense)


def test_left_padding_generates_the_same(llama_model, prompts):
    padded, mask = left_padded(prompts, 4)
    plain = llama_model.generate(prompts, **GREEDY)
    assert torch.equal(llama_model.generate(padded, attention_mask=mask, **GREEDY)[:, 4:], plain)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_generation_modes_follow_the_experts(llama_model, prompts, options):
    """Each row of a mixed batch gives what the dense model of its expert gives in the same mode."""
    experts = [2, 0, 1]
    options = {**GREEDY, **options}
    output = llama_model.generate(prompts, expert_index=experts, **options)
    per_prompt = options.get("num_return_sequences", 1)
    assert len(output) == 3 * per_prompt
    for row, expert in enumerate(experts):
        dense = dense_expert(llama_model, expert).generate(prompts[row : row + 1], **options)
        ours = output[row * per_prompt : (row + 1) * per_prompt]
        length = min(dense.shape[1], ours.shape[1])
        assert torch.equal(ours[:, :length], dense[:, :length])


def test_sampling_follows_the_expert(llama_model, prompts):
    dense = dense_expert(llama_model, 1)
    torch.manual_seed(3)
    ours = llama_model.generate(prompts, expert_index=1, do_sample=True, num_return_sequences=2, max_new_tokens=6)
    torch.manual_seed(3)
    assert torch.equal(ours, dense.generate(prompts, do_sample=True, num_return_sequences=2, max_new_tokens=6))


def test_prompt_lookup_and_assisted_generation(llama_model, prompts):
    expected = llama_model.generate(prompts[:1], expert_index=1, **GREEDY)
    lookup = llama_model.generate(prompts[:1], expert_index=1, prompt_lookup_num_tokens=2, **GREEDY)
    draft = dense_expert(llama_model, 0)
    assisted = llama_model.generate(prompts[:1], expert_index=1, assistant_model=draft, **GREEDY)
    assert torch.equal(lookup, expected) and torch.equal(assisted, expected)


def test_streamer(llama_model, prompts):
    class Recorder(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    recorder = Recorder()
    output = llama_model.generate(prompts[:1], streamer=recorder, **GREEDY)
    assert recorder.tokens == [*output[0].tolist(), "end"]


def test_inputs_embeds(llama_model, prompts):
    dense = dense_expert(llama_model, 2)
    embeds = dense.get_input_embeddings()(prompts).detach()
    ours = llama_model.generate(inputs_embeds=embeds, expert_index=2, **GREEDY)
    assert torch.equal(ours, dense.generate(inputs_embeds=embeds, **GREEDY))
    assert llama_model.generate(inputs_embeds=embeds, **GREEDY).shape[0] == 3


def test_empty_cache_is_routed_afresh(llama_model, prompts):
    cache = DynamicCache(config=llama_model.config.text_config)
    output = llama_model.generate(prompts, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.expert_index, llama_model.route(prompts).expert_index)


def test_token_outside_an_experts_vocabulary_is_never_generated(llama_model, prompts):
    head = llama_model.model.lm_head
    with torch.no_grad():
        favourite = llama_model(prompts, expert_index=1).logits[0, -1].argmax()
        head.channel_index[1, favourite] = -1
        mixed = llama_model(prompts, expert_index=[1, 0, 1]).logits
    assert mixed[0, :, favourite].isneginf().all() and mixed[1].isfinite().all()
    assert favourite not in llama_model.generate(prompts, expert_index=1, **GREEDY)[0, 7:]


class HostReads(TorchDispatchMode):
    """Counts what waits for a device: item(), bool() and int() of tensors, and tolist()."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, tolist = 0, torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def of_generate(self, model, prompts, new_tokens: int, **options) -> int:
        before = self.count
        with self:
            model.generate(prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **options)
        return self.count - before


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("experts", [1, [2, 0, 1], None], ids=["one", "mixed", "routed"])
def test_decoding_reads_nothing_from_the_device(llama_model, prompts, monkeypatch, options, experts):
    """Beyond what the dense model's own generate reads; reordered beams of different experts are read once a step."""
    dense, reads = dense_expert(llama_model, 1), HostReads(monkeypatch)
    llama_model.generate(prompts, expert_index=experts, **GREEDY)  # derives its runs
    merged, expected = (
        [reads.of_generate(model, prompts, count, **options, **given) for count in (3, 8)]
        for model, given in ((llama_model, {"expert_index": experts}), (dense, {}))
    )
    moved = 5 if "num_beams" in options and experts != 1 else 0
    assert merged[1] - merged[0] == expected[1] - expected[0] + moved


# Routing


def test_output_carries_the_routing(llama_model, prompts):
    output = llama_model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    routing = llama_model.route(prompts)
    assert torch.equal(output.router_logits, routing.logits)
    assert torch.equal(output.router_probabilities, routing.probabilities)
    assert torch.equal(output.router_probabilities.argmax(-1), output.expert_index)
    given = llama_model.generate(prompts, expert_index=1, return_dict_in_generate=True, **GREEDY)
    assert given.expert_index.tolist() == [1, 1, 1]
    assert given.router_logits is None and given.router_probabilities is None


def test_threshold_from_end_to_end(llama_model, prompts):
    """Rows that the router is less sure of than the threshold get the default expert's answer, and only those."""
    routing = llama_model.route(prompts)
    best = routing.probabilities.amax(-1)
    threshold, default = (
        (best.min().item() + best.max().item()) / 2,
        (routing.expert_index[best.argmin()].item() + 1) % 3,
    )
    llama_model.config.router.update(threshold=threshold, default_expert=llama_model.config.expert_names[default])
    output = llama_model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    expected = routing.expert_index.where(best >= threshold, default)
    assert not torch.equal(expected, routing.expert_index)
    assert torch.equal(output.expert_index, expected)
    assert torch.equal(output.router_probabilities, routing.probabilities)
    assert torch.equal(output.sequences, llama_model.generate(prompts, expert_index=expected, **GREEDY))


def test_router_inputs_decide(llama_model, prompts):
    """The prompts are answered, other text is routed, and nothing of it reaches the model's forward pass."""
    word, passes = words(llama_model), []
    count_tokens(llama_model.decoder_blocks()[2], passes)
    for experts in ([2, 0, 1], [1, 1, 0]):
        router_input_ids, mask = left_padded(word[experts][:, None], 3)
        passes.clear()
        output = llama_model.generate(
            prompts,
            router_input_ids=router_input_ids,
            router_attention_mask=mask,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert output.expert_index.tolist() == experts
        assert passes == [7, 1, 1, 1, 1, 1]
        assert torch.equal(output.sequences, llama_model.generate(prompts, expert_index=experts, **GREEDY))
        routing = llama_model.route(router_input_ids, mask)
        assert torch.equal(output.router_logits, routing.logits)


def test_router_inputs_of_conversations(llama_model):
    """System prompts and answers change the text, and never the expert."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(99)}, unk_token="w98"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    queries = llama_model.route(torch.tensor([[98, number, number + 1] for number in range(3, 90)]))
    texts = []
    for expert in queries.expert_index.unique().tolist():
        number = 3 + queries.expert_index.tolist().index(expert)
        texts.append(f"w{number} w{number + 1}")
    chosen = set()
    for context in ("last_user_turn", "conversation"):
        llama_model.config.router["context"] = context
        for first, last in itertools.permutations(texts, 2):
            user = [{"role": "user", "content": first}, {"role": "user", "content": last}]
            whole = [{"role": "system", "content": "w7"}, user[0], {"role": "assistant", "content": "w8"}, user[1]]
            inputs = tokenizer.apply_chat_template(
                [whole, user[1:]], padding=True, return_dict=True, return_tensors="pt"
            )
            router_inputs = llama_model.router_inputs(tokenizer, [whole, user[1:]])
            alone = llama_model.router_inputs(tokenizer, user)["router_input_ids"]
            read = last if context == "last_user_turn" else f"{first} {last}"
            assert tokenizer.decode(alone[0]) == f"w98 {read}"
            options = {"return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
            output = llama_model.generate(**inputs, **router_inputs, **options)
            short = llama_model.router_inputs(tokenizer, user[1:])["router_input_ids"]
            expected = [llama_model.route(ids).expert_index.item() for ids in (alone, short)]
            assert output.expert_index.tolist() == expected
            chosen.update(expected)
    assert len(chosen) > 1
    with pytest.raises(ValueError, match="messages hold no query"):
        llama_model.router_inputs(tokenizer, whole[:1])


def test_router_inputs_with_beams_and_embeddings(llama_model, prompts):
    word = words(llama_model)[[2, 0, 1]][:, None]
    beams = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    expected = llama_model.generate(prompts, expert_index=[2, 0, 1], **beams)
    assert torch.equal(llama_model.generate(prompts, router_input_ids=word, **beams), expected)
    embeds = torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(2))
    expected = llama_model.generate(inputs_embeds=embeds, expert_index=[2, 0, 1], **GREEDY)
    assert torch.equal(llama_model.generate(inputs_embeds=embeds, router_input_ids=word, **GREEDY), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_attention_mask": torch.ones(3, 2)}, "without router_input_ids"),
        ({"router_input_ids": torch.ones(3, 2).long(), "expert_index": 1}, "expert_index or router_input_ids"),
        ({"router_input_ids": torch.ones(2, 2).long()}, r"the shape \(2, 2\), expected \(B, S\) for 3 prompts"),
        ({"router_input_ids": torch.ones(3).long()}, r"the shape \(3,\), expected \(B, S\)"),
        (
            {"router_input_ids": torch.ones(3, 2).long(), "router_attention_mask": torch.ones(3, 1)},
            r"router_attention_mask has the shape \(3, 1\), expected that of router_input_ids, \(3, 2\)",
        ),
    ],
    ids=str,
)
def test_wrong_router_inputs(llama_model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        llama_model.generate(prompts, **options, **GREEDY)


def test_prompts_without_tokens(llama_model):
    """Where Transformers fails in a reshape of the first block, the shape is named; no input at all is one BOS."""
    with pytest.raises(ValueError, match=r"the prompts have no tokens: their shape is \(2, 0\)"):
        llama_model.generate(torch.zeros(2, 0, dtype=torch.int64), **GREEDY)
    with pytest.raises(ValueError, match=r"no tokens: their shape is \(1, 0, 48\)"):
        llama_model.generate(inputs_embeds=torch.zeros(1, 0, 48), **GREEDY)
    expected = llama_model.generate(torch.tensor([[1]]), **GREEDY)
    assert torch.equal(llama_model.generate(**GREEDY), expected)


def test_a_prompt_of_padding_in_a_batch(text_config, prompts):
    """The default expert answers it, and its neighbours do not notice."""
    model = random_model(text_config, 3)
    model.config.router["default_expert"] = "code"
    padded, mask = left_padded(prompts, 2)
    padded[1], mask[1] = 0, 0
    output = model.generate(padded, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert output.expert_index[1] == 2 and output.router_logits[1].tolist() == [0, 0, 0]
    assert all(logits.isfinite().all() for logits in output.logits)
    for row in (0, 2):
        alone = model.generate(prompts[row : row + 1], **GREEDY)
        assert torch.equal(output.sequences[row, 2 : 2 + alone.shape[1]], alone[0])


def test_prompts_longer_than_the_router_reads(llama_model):
    """The router reads the two ends, the expert everything."""
    llama_model.config.router["max_tokens"] = 6
    prompts = torch.randint(3, 99, (2, 300), generator=torch.Generator().manual_seed(4))
    ends = torch.cat([prompts[:, :3], prompts[:, -3:]], dim=1)
    output = llama_model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.router_logits, llama_model.route(ends).logits)
    assert torch.equal(output.sequences, llama_model.generate(prompts, expert_index=output.expert_index, **GREEDY))


# A new turn on a filled cache


def sliding(**options):
    return Qwen2Config(
        **{**SIZES, "num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        **options,
    )


CACHES = {
    "dynamic": (CONFIGS["llama"], DynamicCache),
    "dynamic-sliding": (sliding, DynamicCache),
    "static": (CONFIGS["llama"], lambda config: StaticCache(config=config, max_cache_len=64)),
    "static-sliding": (sliding, lambda config: StaticCache(config=config, max_cache_len=64)),
    "gemma2-static": (
        lambda: Gemma2Config(**SIZES, head_dim=12, sliding_window=6, attn_implementation="eager"),
        lambda config: StaticCache(config=config, max_cache_len=64),
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_conversation_on_one_cache_is_that_without_a_cache(kind):
    """Four turns for experts a, a, b, a: the cache goes on where the expert does, and is read anew where not."""
    config, make_cache = CACHES[kind]
    model, passes = random_model(config(), 3), []
    word = words(model)
    cache = make_cache(config=model.config.text_config)
    count_tokens(model.decoder_blocks()[2], passes)
    conversation = torch.randint(3, 99, (1, 7), generator=torch.Generator().manual_seed(1))
    for turn, expert in enumerate([1, 1, 0, 1]):
        options = {**GREEDY, "router_input_ids": word[None, expert : expert + 1], "return_dict_in_generate": True}
        fresh = model.generate(conversation, **options)
        passes.clear()
        filled = int(cache.get_seq_length())
        output = model.generate(conversation, past_key_values=cache, **options)
        assert torch.equal(output.sequences, fresh.sequences)
        assert output.past_key_values is cache and output.expert_index.tolist() == [expert]
        assert passes[0] == conversation.shape[1] - (filled if turn == 1 else 0)
        new_words = torch.randint(3, 99, (1, 3), generator=torch.Generator().manual_seed(turn + 9))
        conversation = torch.cat([output.sequences, new_words], dim=1)


def test_one_row_of_a_batch_changes_its_expert(text_config, prompts):
    """With left padding: both rows get the text of a fresh call."""
    model = random_model(text_config, 3)
    word = words(model)
    padded, mask = left_padded(prompts[:2], 2)
    mask[0, 2:5] = 0
    padded[0, 2:5] = 0
    first = model.generate(
        padded, attention_mask=mask, router_input_ids=word[[2, 0]][:, None], return_dict_in_generate=True, **GREEDY
    )
    conversation = torch.cat([first.sequences, prompts[1:, :3]], dim=1)
    mask = torch.cat([mask, torch.ones(2, conversation.shape[1] - mask.shape[1], dtype=torch.int64)], dim=1)
    for router_input_ids in (word[[2, 1]], word[[2, 0]]):
        options = {"attention_mask": mask, "router_input_ids": router_input_ids[:, None], **GREEDY}
        fresh = model.generate(conversation, **options)
        assert torch.equal(model.generate(conversation, past_key_values=first.past_key_values, **options), fresh)


def test_the_prompt_itself_routes_a_new_turn(llama_model, prompts):
    """Without router inputs, the whole conversation is what the router reads, with a cache as without."""
    first = llama_model.generate(prompts, expert_index=[2, 2, 2], return_dict_in_generate=True, **GREEDY)
    fresh = llama_model.generate(first.sequences, return_dict_in_generate=True, **GREEDY)
    assert fresh.expert_index.tolist() != [2, 2, 2]
    again = llama_model.generate(
        first.sequences, past_key_values=first.past_key_values, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(again.sequences, fresh.sequences) and torch.equal(again.router_logits, fresh.router_logits)


@pytest.mark.parametrize("expert_index", ["code", [2, 2, 1], torch.tensor([0, 1, 2])], ids=str)
def test_a_given_expert_takes_over_a_cache(llama_model, prompts, expert_index):
    first = llama_model.generate(prompts, expert_index=1, return_dict_in_generate=True, **GREEDY)
    fresh = llama_model.generate(first.sequences, expert_index=expert_index, **GREEDY)
    options = {"past_key_values": first.past_key_values, "expert_index": expert_index, **GREEDY}
    assert torch.equal(llama_model.generate(first.sequences, **options), fresh)


def test_new_tokens_alone_go_on_with_the_experts_of_their_cache(llama_model, prompts):
    """Given with the whole conversation's mask; what another expert would have to read is not there."""
    word = words(llama_model)[[0, 0, 0]][:, None]
    first = llama_model.generate(prompts, router_input_ids=word, return_dict_in_generate=True, **GREEDY)
    cache, length = first.past_key_values, first.past_key_values.get_seq_length()
    conversation = torch.cat([first.sequences, prompts[:, :3]], dim=1)
    fresh = llama_model.generate(conversation, expert_index=0, **GREEDY)
    options = {"past_key_values": cache, "attention_mask": torch.ones_like(conversation), **GREEDY}
    for other in ({"expert_index": 1}, {"router_input_ids": words(llama_model)[[0, 1, 0]][:, None]}):
        with pytest.raises(ValueError, match="only the new tokens are given: give the whole conversation"):
            llama_model.generate(conversation[:, length:], **options, **other)
    output = llama_model.generate(conversation[:, length:], **options, return_dict_in_generate=True)
    assert output.expert_index.tolist() == [0, 0, 0] and output.router_logits is None
    assert torch.equal(output.sequences[:, -6:], fresh[:, -6:])


def test_a_cache_that_cannot_be_emptied(llama_model, prompts):
    class Fixed(DynamicCache):
        def reset(self):
            raise NotImplementedError

    class Forgetful(DynamicCache):
        def reset(self):
            pass

    for kind, problem in ((Fixed, "a Fixed cannot be emptied"), (Forgetful, "a Forgetful is not empty after reset")):
        cache = kind(config=llama_model.config.text_config)
        first = llama_model.generate(prompts, past_key_values=cache, expert_index=1, **GREEDY)
        with pytest.raises(ValueError, match=f"{problem}.*: start from a new cache"):
            llama_model.generate(first, past_key_values=cache, expert_index=2, **GREEDY)


def test_plain_forward_refuses_a_cache_of_another_expert(llama_model, prompts):
    first = llama_model.generate(prompts, expert_index=1, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="row 0 asks for expert 'code', but past_key_values was filled by 'math'"):
        llama_model(first.sequences[:, -1:], past_key_values=first.past_key_values, expert_index=2)


def test_a_prefix_read_once_serves_many_prompts(llama_model, prompts):
    """A cache of one row whose rows were repeated goes on, as far as one expert filled it."""
    prefix = prompts[:1].expand(3, -1)
    cache = llama_model(prompts[:1], expert_index=1, use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    whole = torch.cat([prefix, prompts], dim=1)
    passes = []
    count_tokens(llama_model.decoder_blocks()[2], passes)
    fresh = llama_model.generate(whole, expert_index=1, **GREEDY)
    passes.clear()
    assert torch.equal(llama_model.generate(whole, past_key_values=cache, expert_index=1, **GREEDY), fresh)
    assert passes[0] == 7


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_every_call_routes_once(llama_model, prompts, options):
    """Decoding calls the model with a filled cache many times; none of them routes, or empties the cache."""
    routed, emptied = [], []
    llama_model.router.register_forward_pre_hook(lambda *args: routed.append(1))
    reset = DynamicCache.reset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicCache, "reset", lambda cache: emptied.append(1) or reset(cache))
        llama_model.generate(prompts[:1], **{**GREEDY, **options})
    assert routed == [1] and not emptied


@pytest.mark.parametrize("options", [{"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 3}], ids=str)
def test_a_new_turn_in_other_modes(llama_model, prompts, options):
    """Beams and chunks of a conversation whose cache another expert filled."""
    options, word = {**GREEDY, **options}, words(llama_model)
    copies = options.get("num_return_sequences", 1)
    cache = DynamicCache(config=llama_model.config.text_config)
    llama_model.generate(prompts, past_key_values=cache, router_input_ids=word[[0, 1, 2]][:, None], **options)
    conversation = torch.cat([prompts, prompts], dim=1)
    fresh = llama_model.generate(conversation, expert_index=[2, 1, 0], **options)
    options |= {"past_key_values": cache, "router_input_ids": word[[2, 1, 0]][:, None]}
    assert torch.equal(llama_model.generate(conversation, **options), fresh) and len(fresh) == 3 * copies


def test_assisted_by_channel_merged_drafts(llama_model, prompts):
    """A draft is asked again and again with its own cache: it keeps the expert of its first answer."""
    expected = llama_model.generate(prompts[:1], expert_index=1, **GREEDY)
    draft, routed = random_model(CONFIGS["llama"](), 3, seed=5), []
    draft.router.register_forward_pre_hook(lambda *args: routed.append(1))
    assisted = llama_model.generate(prompts[:1], expert_index=1, assistant_model=draft, **GREEDY)
    assert torch.equal(assisted, expected) and not routed
    dense = dense_expert(llama_model, 1)
    assert torch.equal(dense.generate(prompts[:1], assistant_model=draft, **GREEDY), expected)
    assert routed == [1]


def asked_experts(draft, monkeypatch) -> list:
    """What a draft is asked for, as `generate` hands it over."""
    asked, generate = [], draft.generate
    record = lambda *args, **kwargs: asked.append(kwargs.get("expert_index")) or generate(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(draft, "generate", record)
    return asked


def test_a_draft_is_asked_for_the_expert_of_that_name(llama_model, prompts, monkeypatch):
    """Its numbers are its own; without an expert of that name it routes, by its own router, once."""
    expected = llama_model.generate(prompts[:1], expert_index="code", **GREEDY)
    for names, handed in ((["code", "law", "instruct"], ["code"]), (["a", "b", "c"], None)):
        draft, routed = random_model(CONFIGS["llama"](), 3, seed=5), []
        draft.config.expert_names = names
        draft.config.router.update(trunk_expert=names[0], default_expert=names[0])
        draft.router.register_forward_pre_hook(lambda *args, routed=routed: routed.append(1))
        asked = asked_experts(draft, monkeypatch)
        output = llama_model.generate(prompts[:1], expert_index="code", assistant_model=draft, **GREEDY)
        assert torch.equal(output, expected)
        assert asked and all(given == handed for given in asked)
        assert len(routed) == (handed is None)


def test_a_draft_of_another_copy_of_the_code_is_known(llama_model, prompts, monkeypatch, tmp_path):
    """As remote code it is of no class that this process knows."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    random_model(CONFIGS["llama"](), 3, seed=5).save_pretrained(tmp_path)
    remote = get_class_from_dynamic_module("modeling_channel_merged.ChannelMergedForCausalLM", tmp_path)
    draft = remote.from_pretrained(tmp_path).eval()
    assert not isinstance(draft, ChannelMergedForCausalLM)
    asked = asked_experts(draft, monkeypatch)
    assisted = llama_model.generate(prompts[:1], expert_index=1, assistant_model=draft, **GREEDY)
    assert torch.equal(assisted, llama_model.generate(prompts[:1], expert_index=1, **GREEDY))
    assert asked and all(given == ["math"] for given in asked)


def test_assisted_on_a_cache_of_another_expert(llama_model, prompts):
    first = llama_model.generate(prompts[:1], expert_index=0, return_dict_in_generate=True, **GREEDY)
    expected = llama_model.generate(first.sequences, expert_index=1, **GREEDY)
    draft = dense_expert(llama_model, 0)
    options = {"past_key_values": first.past_key_values, "expert_index": 1, "assistant_model": draft, **GREEDY}
    assert torch.equal(llama_model.generate(first.sequences, **options), expected)
