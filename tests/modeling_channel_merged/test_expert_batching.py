"""Continuous batching: each request as `generate` answers it alone, whatever else runs beside it."""

import logging
import random
from collections import defaultdict

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
)
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from modeling_channel_merged.active_experts import active_experts
from modeling_channel_merged.expert_batching import ExpertPagedCache

from .conftest import CONFIGS, SIZES, random_model

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = CONFIGS | {
    "gpt2": lambda: GPT2Config(vocab_size=99, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=12, **SLIDING),
}
EXPERTS = 4
NEW_TOKENS = 5
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SECONDS = 60


def small(**options) -> ContinuousBatchingConfig:
    """Room for several requests; the prompts of `random_prompts` can take more than one step."""
    return ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 60, "max_batch_tokens": 48, **options})


def small_model(**options):
    return random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 2, **options}), EXPERTS)


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 99) for _ in range(draw.choice([1, 5, 17, 60]))] for _ in range(count)]


def answers_of_generate(model, prompts, experts=None, **options) -> list[list[int]]:
    """What `generate` gives for each prompt; those of one length in one batch, without padding after the end."""
    places = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[len(prompt)].append(place)
    answers = {}
    for length, same in places.items():
        chosen = None if experts is None else [experts[place] for place in same]
        tokens = model.generate(torch.tensor([prompts[place] for place in same]), expert_index=chosen, **options)
        output = tokens[:, length:].tolist()
        answers.update(zip(same, output, strict=True))
    return [answers[place] for place in range(len(prompts))]


def until_finished(manager, request_ids) -> dict:
    """The last output of each of the requests."""
    outputs = {}
    while outputs.keys() != {*request_ids}:
        output = manager.get_result(timeout=SECONDS)
        assert output is not None, manager.background_thread_status.fatal_error or "no answer"
        if output.is_finished():
            outputs[output.request_id] = output
    return outputs


def tokens_of(outputs) -> list[list[int]]:
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


@pytest.fixture
def no_end(monkeypatch):
    """Answers of full length, whatever a random model says."""
    monkeypatch.setitem(GREEDY, "eos_token_id", -1)


class TestGenerateBatch:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_fifty_requests_of_all_experts(self, family, no_end):
        """Prompts are read in several steps, with answers of other experts in the same steps."""
        model = random_model(FAMILIES[family](), EXPERTS)
        count = 50 if family == "llama" else 12
        prompts, draw = [prompt[:55] for prompt in random_prompts(count)], random.Random(1)
        experts = [draw.randrange(EXPERTS) for _ in prompts]
        outputs = model.generate_batch(prompts, GenerationConfig(**GREEDY), small(), expert_index=experts)
        assert tokens_of(outputs) == answers_of_generate(model, prompts, experts, **GREEDY)
        assert [output.expert_index for output in outputs.values()] == experts
        names = model.config.expert_names
        assert [output.expert_name for output in outputs.values()] == [names[expert] for expert in experts]
        assert all(output.router_probabilities is None for output in outputs.values())

    def test_without_experts_each_prompt_is_routed(self, no_end):
        model, prompts = small_model(), random_prompts(12)
        outputs = model.generate_batch(prompts, GenerationConfig(**GREEDY), small())
        assert tokens_of(outputs) == answers_of_generate(model, prompts, **GREEDY)
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            routing = model.route(torch.tensor([prompt]))
            assert output.expert_index == routing.expert_index.item()
            assert output.router_probabilities == tuple(routing.probabilities[0].tolist())
        assert len({output.expert_index for output in outputs.values()}) > 1

    def test_an_untrained_router_answers_with_the_default_expert(self, caplog):
        model = random_model(CONFIGS["llama"](), EXPERTS, trained_router=False)
        outputs = model.generate_batch([[5, 6]], GenerationConfig(**GREEDY), small())
        assert [output.expert_name for output in outputs.values()] == ["instruct"]

    def test_a_generation_config_is_completed_as_by_generate(self):
        """End tokens and lengths come from the model's own where none are given: 20 new tokens, or a length in all."""
        model, prompts = small_model(), [[5, 6, 7], [8, 9]]
        outputs = tokens_of(model.generate_batch(prompts, None, small(), expert_index="math"))
        with pytest.warns(UserWarning, match="max_length"):
            assert outputs == answers_of_generate(model, prompts, ["math", "math"])
        model.generation_config.max_length = 9
        outputs = tokens_of(model.generate_batch(prompts, None, small(), expert_index="math"))
        assert outputs == answers_of_generate(model, prompts, ["math", "math"])
        assert model.generation_config.max_new_tokens is None

    def test_several_sequences_keep_the_expert_of_their_prompt(self, no_end):
        model, prompts = small_model(), [[5, 6, 7], [8, 9]]
        sampled = {"do_sample": True, "temperature": 1e-6, "top_k": 0}
        config = GenerationConfig(**GREEDY | sampled, num_return_sequences=3)
        outputs = model.generate_batch(prompts, config, small(), expert_index=["code", "math"])
        expected = answers_of_generate(model, prompts, ["code", "math"], **GREEDY)
        assert tokens_of(outputs) == [expected[0]] * 3 + [expected[1]] * 3
        assert [output.expert_name for output in outputs.values()] == ["code"] * 3 + ["math"] * 3

    @pytest.mark.parametrize(
        ("prompts", "experts", "problem"),
        [
            ([[5], []], None, "the prompt has no tokens"),
            ([[5, 99]], None, "token ids 5 to 99, expected 0 to 98"),
            ([[5, -1]], None, "token ids -1 to 5, expected 0 to 98"),
            ([[5]], "maths", "unknown expert 'maths': this model has"),
            ([[5]], [0, 1], "names 2 experts for a batch of 1 rows"),
            ([[5] * 470], None, "470 tokens and max_new_tokens is 11, but one request can have 480 in all"),
        ],
    )
    def test_what_cannot_run_is_an_error(self, prompts, experts, problem, caplog):
        with pytest.raises(ValueError, match=problem):
            small_model().generate_batch(prompts, GenerationConfig(max_new_tokens=11), small(), expert_index=experts)

    @pytest.mark.parametrize("name", ["eager", "paged|eager"])
    def test_eager_attention_is_refused(self, name):
        model = small_model()
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match=f"implementation '{name[:5]}.*sdpa"):
            model.init_continuous_batching()

    @pytest.mark.parametrize(
        ("text_config", "problem"),
        [
            (Gemma2Config(**SIZES, head_dim=12), "soft-capping"),
            (FalconConfig(vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4), "'falcon'"),
        ],
        ids=["gemma2", "falcon"],
    )
    def test_architectures_without_paged_attention_are_refused(self, text_config, problem):
        with pytest.raises(ValueError, match=problem):
            random_model(text_config, 2).generate_batch([[5]], GenerationConfig(**GREEDY), small())


class TestManager:
    def test_requests_arrive_while_others_run(self, no_end):
        """In any order, by name or number, routed or not; one is cancelled in the middle, others keep their tokens."""
        model, prompts = small_model(), random_prompts(14, seed=3)
        experts = [[None, "code", 3, "math"][place % 4] for place in range(14)]
        with model.continuous_batching_context_manager(GenerationConfig(**GREEDY), True, 5, small()) as manager:
            victim = manager.add_request([7] * 20, max_new_tokens=300, streaming=True, expert_index=2)
            for number in range(3):
                assert manager.get_result(timeout=SECONDS).request_id == victim, number
            ids = [manager.add_request(prompts[0], expert_index=experts[0])]
            manager.cancel_request(victim)
            for prompt, expert in zip(prompts[1:], experts[1:], strict=True):
                ids.append(manager.add_request(prompt, expert_index=expert))
            outputs = {}
            while outputs.keys() != {*ids}:
                output = manager.get_result(timeout=SECONDS)
                if output.request_id != victim:
                    outputs[output.request_id] = output
            assert not manager.batch_processor.scheduler.active_requests
        for place, request_id in enumerate(ids):
            chosen = outputs[request_id].expert_index
            assert [outputs[request_id].generated_tokens] == answers_of_generate(
                model, [prompts[place]], [chosen], **GREEDY
            )
            given = model.route(torch.tensor([prompts[place]])).expert_index.item()
            assert chosen == (given if experts[place] is None else model.config.expert_id(experts[place]))

    def test_a_choice_made_before_and_the_routers_own_inputs(self, no_end):
        model = small_model()
        tokens = torch.arange(3, 99)
        routed = model.route(tokens[:, None]).expert_index
        word = {expert: tokens[routed == expert][0].item() for expert in routed.tolist()}
        alone = model.route(torch.tensor([[5, 6, 7]])).expert_index.item()
        query = next(token for expert, token in word.items() if expert != alone)
        with model.continuous_batching_context_manager(GenerationConfig(**GREEDY), True, 5, small()) as manager:
            choice = manager.choose_expert([5, 6, 7], router_input_ids=[query])
            assert choice.expert_index == routed[query - 3]
            assert choice.expert_name == model.config.expert_names[choice.expert_index]
            first = manager.add_request([5, 6, 7], expert_index=choice)
            second = manager.add_request([5, 6, 7], router_input_ids=[query])
            outputs = until_finished(manager, [first, second])
        expected = answers_of_generate(model, [[5, 6, 7]], [choice.expert_index], **GREEDY)
        for output in outputs.values():
            assert [output.generated_tokens] == expected
            assert output.router_probabilities == choice.router_probabilities

    def test_every_output_of_a_stream_has_its_expert(self, no_end):
        model = small_model()
        with model.continuous_batching_context_manager(GenerationConfig(**GREEDY), True, 5, small()) as manager:
            manager.add_request([5, 6], streaming=True, expert_index=1)
            outputs = [manager.get_result(timeout=SECONDS) for _ in range(NEW_TOKENS)]
        assert [len(output.generated_tokens) for output in outputs] == [1, 2, 3, 4, 5]
        assert {output.expert_name for output in outputs} == {"math"}

    def test_a_full_cache_restarts_requests(self, no_end, monkeypatch):
        """With blocks for a part of them, requests are put back and read anew by their own expert."""
        restarted, offload = [], OffloadingManager.offload_requests
        monkeypatch.setattr(
            OffloadingManager,
            "offload_requests",
            lambda self: restarted.append(len(self.scheduler.starved_requests)) or offload(self),
        )
        model, options = small_model(), {**GREEDY, "max_new_tokens": 24}
        prompts = [prompt[:30] for prompt in random_prompts(10, seed=5)]
        experts = [place % EXPERTS for place in range(10)]
        outputs = model.generate_batch(
            prompts, GenerationConfig(**options), small(num_blocks=12), expert_index=experts
        )
        assert any(restarted)
        assert tokens_of(outputs) == answers_of_generate(model, prompts, experts, **options)
        assert [output.expert_index for output in outputs.values()] == experts

    def test_prefixes_are_shared_within_an_expert_alone(self, no_end, monkeypatch):
        shared, match = [], ExpertPagedCache.search_prefix_match
        monkeypatch.setattr(
            ExpertPagedCache,
            "search_prefix_match",
            lambda self, *args: shared.append(match(self, *args)) or shared[-1],
        )
        model, prefix = small_model(), list(range(10, 43))
        prompts = [[*prefix, token] for token in (5, 6, 7, 8)]
        experts = [1, 2, 1, 2]
        with model.continuous_batching_context_manager(GenerationConfig(**GREEDY), True, 5, small()) as manager:
            outputs = [
                until_finished(manager, [manager.add_request(prompt, expert_index=expert)]).popitem()[1]
                for prompt, expert in zip(prompts, experts, strict=True)
            ]
        assert shared == [0, 0, 32, 32]
        assert tokens_of(outputs) == answers_of_generate(model, prompts, experts, **GREEDY)

    def test_each_request_ends_at_its_own_experts_tokens(self):
        """One expert's end is a word to another; other end tokens, given for a request, end it alone."""
        model, prompt = small_model(), [5, 6, 7]
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
        math, code = answers_of_generate(model, [prompt, prompt], [1, 2], **options)
        ends = {"instruct": [2], "math": [math[3]], "code": [code[5]], "chinese": []}
        model.config.expert_eos_token_ids = ends
        everyone = [2, math[3], code[5]]
        own = [math[: math.index(math[3]) + 1], code[: code.index(code[5]) + 1]]
        config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=everyone)
        outputs = model.generate_batch([prompt, prompt], config, small(), expert_index=[1, 2])
        assert tokens_of(outputs) == own
        with model.continuous_batching_context_manager(config, True, 5, small()) as manager:
            ids = [
                manager.add_request(prompt, expert_index=1, eos_token_id=[math[1]]),
                manager.add_request(prompt, expert_index=1, eos_token_id=-1),
                manager.add_request(prompt, expert_index=2, eos_token_id=everyone),
            ]
            outputs = until_finished(manager, ids)
        expected = [math[: math.index(math[1]) + 1], math, own[1]]
        assert [outputs[request_id].generated_tokens for request_id in ids] == expected

    def test_sampling_draws_from_the_requests_own_expert(self):
        """At a temperature near zero, and with one token to choose from, a sample is the greedy one."""
        model, prompts = small_model(), random_prompts(6)
        experts = [place % EXPERTS for place in range(6)]
        expected = answers_of_generate(model, prompts, experts, max_new_tokens=5, do_sample=False)
        config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=1e-6, top_k=0)
        assert tokens_of(model.generate_batch(prompts, config, small(), expert_index=experts)) == expected
        config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=1.5, top_k=30)
        options = small(per_request_processors=True)
        with model.continuous_batching_context_manager(config, True, 5, options) as manager:
            ids = [manager.add_request(prompt, expert_index=e, top_k=1) for prompt, e in zip(prompts, experts)]
            outputs = until_finished(manager, ids)
            with pytest.raises(ValueError, match="typical"):
                manager.add_request(prompts[0], typical=1)
        assert [outputs[request_id].generated_tokens for request_id in ids] == expected

    def test_tokens_that_an_expert_does_not_have(self, no_end):
        model, prompts = small_model(), random_prompts(8)
        head = model.model.lm_head
        head.channel_index = head.channel_index.index_fill(1, torch.arange(40, 99), -1).where(
            torch.arange(EXPERTS)[:, None] == 1, head.channel_index
        )
        experts = [place % EXPERTS for place in range(8)]
        outputs = model.generate_batch(prompts, GenerationConfig(**GREEDY), small(), expert_index=experts)
        assert tokens_of(outputs) == answers_of_generate(model, prompts, experts, **GREEDY)

    def test_steps_of_padded_sizes_read_the_experts_from_the_same_memory(self, no_end):
        """As where steps are captured or compiled: the experts change, the tensor that they are read from does not."""
        model, prompts, places = small_model(), random_prompts(8), set()
        experts = [place % EXPERTS for place in range(8)]
        hook = model.model.get_input_embeddings().register_forward_pre_hook(
            lambda *args: places.add((active_experts().expert, active_experts().expert_index.data_ptr()))
        )
        options = small(q_padding_interval_size=16, kv_padding_interval_size=64)
        manager = model.init_continuous_batching(GenerationConfig(**GREEDY), options)
        manager.warmup()
        manager.batch_processor.model_runner.pad_inputs = True
        manager.start()
        ids = [manager.add_request(prompt, expert_index=e) for prompt, e in zip(prompts, experts, strict=True)]
        outputs = until_finished(manager, ids)
        manager.stop()
        hook.remove()
        assert len(places) == 1
        expected = answers_of_generate(model, prompts, experts, **GREEDY)
        assert [outputs[request_id].generated_tokens for request_id in ids] == expected

    def test_the_model_answers_other_threads_meanwhile(self, no_end):
        """Routing and plain calls beside a running step are those of a model that does nothing else."""
        model, prompt = small_model(), torch.tensor([random_prompts(20)[3]])
        logits, routed = model(prompt, expert_index=1).logits, model.route(prompt).logits
        config = GenerationConfig(max_new_tokens=120, do_sample=False, eos_token_id=-1)
        with model.continuous_batching_context_manager(config, True, 30, small()) as manager:
            ids = [manager.add_request([7] * 30, expert_index=expert) for expert in (0, 3)]
            for _ in range(12):
                assert torch.equal(model(prompt, expert_index=1).logits, logits)
                assert torch.equal(model.route(prompt).logits, routed)
            assert manager.batch_processor.has_pending_requests()
            outputs = until_finished(manager, ids)
        assert tokens_of(outputs) and torch.equal(model.route(prompt).logits, routed)

    def test_two_requests_of_one_id(self, no_end):
        """Waiting to be seen, or running."""
        model = small_model()
        manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small())
        manager.add_request([5, 6], "a", 200, streaming=True, expert_index=0)
        with pytest.raises(ValueError, match="a request 'a' is not finished yet"):
            manager.add_request([7], "a", expert_index=1)
        manager.start()
        assert manager.get_result(timeout=SECONDS).expert_index == 0
        with pytest.raises(ValueError, match="a request 'a' is not finished yet"):
            manager.add_request([7], "a", expert_index=1)
        manager.cancel_request("a")
        manager.stop()

    def test_after_it_stopped_requests_are_refused(self):
        model = small_model()
        manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small())
        manager.start()
        manager.stop()
        with pytest.raises(RuntimeError, match="the request cannot be added: The background thread is stopping"):
            manager.add_request([5], expert_index=0)

    def test_a_failed_step_is_the_error_of_its_requests(self, caplog):
        model = small_model()
        model.model.lm_head.register_forward_pre_hook(lambda *args: 1 / 0)
        with caplog.at_level(logging.CRITICAL):
            outputs = model.generate_batch([[5, 6]], GenerationConfig(**GREEDY), small(), expert_index=1)
        (output,) = outputs.values()
        assert output.error == "division by zero" and output.expert_name == "math"
