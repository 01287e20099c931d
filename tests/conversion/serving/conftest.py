"""A small checkpoint whose experts differ, and a server of it on a port of this machine."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from conversion.serve import bound_socket
from conversion.serving.answers import ExpertGenerationState
from conversion.serving.application import build_application
from conversion.serving.model_manager import MergedModelManager
from modeling_channel_merged import ChannelMergedConfig, ChannelMergedForCausalLM

PLAIN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
TEMPLATES = {
    "default": PLAIN,
    "code": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN,
    "chinese": "{% for turn in messages if turn['role'] != 'system' %}{{ '问' + turn['content'] }}{% endfor %}",
}
EXPERTS = ("math", "code", "chinese")
API_KEY = "a key"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Three experts with a template each, one with end tokens of its own, a random router and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("served") / "trio"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATES
    fast.save_pretrained(folder)
    text_config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    # Every fourth token ends the answers of code, none those of math.
    ends = {"math": [], "code": list(range(1, len(vocabulary), 4)), "chinese": [1]}
    config = ChannelMergedConfig(
        text_config=text_config, expert_names=list(EXPERTS), router={"max_tokens": 40}, expert_eos_token_ids=ends
    )
    torch.manual_seed(0)
    model = ChannelMergedForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("channel_index"):  # the same rows for all, each in an order of its own
            buffer.copy_(torch.stack([torch.randperm(buffer.shape[1]) for _ in buffer]))
    model.generation_config.eos_token_id = sorted({token for tokens in ends.values() for token in tokens})
    model.save_pretrained(folder)
    return folder


@dataclass
class Served:
    """A running server, the manager of its model and its address."""

    url: str
    manager: MergedModelManager
    state: ExpertGenerationState
    server: uvicorn.Server

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": API_KEY, "max_retries": 0, **options})

    def running(self) -> set[str]:
        """Requests that hold a place in the running batch or wait for one, and handlers of answers."""
        cb = self.state.get_manager()._cb
        scheduler = cb.batch_processor.scheduler
        return {*scheduler.active_requests, *scheduler.waiting_requests, *cb.output_router.result_handlers}

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while self.running():
            assert time.monotonic() < deadline, self.running()
            time.sleep(0.02)


@contextmanager
def serving(checkpoint: Path, grace: int | None = None, cache_tokens: int = 8192, **options) -> Iterator[Served]:
    manager = MergedModelManager(checkpoint, "cpu")
    state = ExpertGenerationState(manager.model, cache_tokens)
    application = build_application(
        manager, state, **{"max_tokens": 1500, "max_body": 20_000, "api_key": API_KEY, **options}
    )
    listener = bound_socket("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(application, log_config=None, lifespan="on", timeout_graceful_shutdown=grace)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", manager, state, server)
    finally:
        server.should_exit = True
        thread.join()
        state.shutdown()
        listener.close()


@pytest.fixture(name="serving")
def serving_fixture():
    return serving


@pytest.fixture(scope="session")
def served(checkpoint) -> Iterator[Served]:
    with serving(checkpoint) as server:
        yield server


@pytest.fixture
def client(served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client
