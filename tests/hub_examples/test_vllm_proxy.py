"""What needs no engine of the vLLM plugin: selector adapters, the router's trunk, and the proxy before a stand-in."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PLUGIN = Path(__file__).parents[2] / "hub_examples" / "vllm_plugin"


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    monkeypatch.syspath_prepend(PLUGIN)


@pytest.fixture
def merged(make_experts, write_recipe, tmp_path):
    """Two experts of three blocks in several shards; the router reads one block, with random weights."""
    from conversion.convert import convert

    base, experts = make_experts("qwen2", 2, delta_scale=0.15, num_hidden_layers=3)
    write_recipe(base, experts, tmp_path / "recipe.yaml", dtype="float32")
    folder = tmp_path / "merged"
    convert(tmp_path / "recipe.yaml", folder, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.router.head.weight, std=0.1)
    torch.nn.init.normal_(model.router.ngrams.weight)
    model.config.expert_eos_token_ids = {"e0": [257], "e1": [257, 10]}
    (folder / "model.safetensors").unlink()  # would be read instead of shards
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def run_selectors(monkeypatch, *arguments):
    from channel_merged_vllm import selectors

    monkeypatch.setattr(sys, "argv", ["channel-merged-selectors", *map(str, arguments)])
    selectors.main()


def test_selectors(merged, tmp_path, monkeypatch, capsys):
    """One adapter an expert, whose factors make its number, and the command that serves them all."""
    run_selectors(monkeypatch, merged, tmp_path / "adapters")
    printed = capsys.readouterr().out
    for number, name in enumerate(["e0", "e1"], start=1):
        folder = tmp_path / "adapters" / name
        assert f"{name}={folder}" in printed
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["r"] == 1 and settings["target_modules"] == ["expert_selector"]
        tensors = load_file(folder / "adapter_model.safetensors")
        down, up = (tensors[f"base_model.model.expert_selector.lora_{factor}.weight"] for factor in "AB")
        assert (up @ (down @ torch.ones(down.shape[1])))[0] == number
    assert f"vllm serve {merged} --enable-lora --max-loras 2 --lora-modules" in printed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".adapters")) == []


def test_selectors_are_refused(merged, tmp_path, monkeypatch):
    """Nothing is overwritten, and another model has no experts."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="taken exists and is not an empty folder"):
        run_selectors(monkeypatch, merged, taken)
    assert [file.name for file in taken.iterdir()] == ["mine"]
    with pytest.raises(SystemExit, match="model_type is 'qwen2', expected 'channel_merged'"):
        run_selectors(monkeypatch, next(tmp_path.glob("qwen2*/base")), tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_trunk_routes_as_the_whole_model(merged):
    """Fewer blocks and no head, and bit for bit the same router logits."""
    from channel_merged_vllm.trunk import RouterTrunk, trunk_config

    trunk = RouterTrunk.from_pretrained(merged, config=trunk_config(str(merged))).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert len(trunk.decoder_blocks()) == 1 < len(whole.decoder_blocks()) and trunk.router.is_trained
    query = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(trunk.route(query).logits, whole.route(query).logits)


@pytest.fixture
def ask(merged):
    """Send a request through the proxy to a stand-in for vLLM, which answers with what it was sent."""
    httpx = pytest.importorskip("httpx", reason="the proxy needs httpx")
    pytest.importorskip("fastapi", reason="the proxy needs fastapi")
    from channel_merged_vllm.proxy import Router, make_app

    def upstream(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "e0"}, {"id": "e1"}]})
        if request.url.path == "/down":
            raise httpx.ConnectError("refused")
        sent = {"path": request.url.path, "key": request.headers.get("authorization")}
        answer = json.dumps(sent | {"body": json.loads(request.content or "null")})

        async def pieces():
            for letter in answer:
                yield letter.encode()

        return httpx.Response(200, content=pieces(), headers={"content-type": "application/json"})

    router = Router(str(merged))

    def call(method: str, path: str, **options):
        async def send():
            vllm = httpx.AsyncClient(transport=httpx.MockTransport(upstream), base_url="http://vllm")
            app = httpx.ASGITransport(make_app(router, vllm))
            async with httpx.AsyncClient(transport=app, base_url="http://proxy") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    call.router = router
    return call


def test_auto_goes_to_the_expert_that_the_router_picks(ask, merged):
    """The request goes on with the expert's name and its own end tokens; whatever else is in it stays."""
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    for prompt in ("one plus two", "hello", "def f():"):
        answer = ask("POST", "/v1/completions", json={"model": "auto", "prompt": prompt, "n": 2})
        tokens = ask.router.tokenizer(prompt, return_tensors="pt")["input_ids"]
        expert = f"e{int(whole.route(tokens).expert_index)}"
        assert answer.status_code == 200 and answer.headers["x-expert"] == expert
        assert 0.5 <= float(answer.headers["x-expert-probability"]) <= 1
        ends = {"e0": [257], "e1": [257, 10]}[expert]
        body = {"model": expert, "prompt": prompt, "n": 2, "ignore_eos": True, "stop_token_ids": ends}
        assert answer.json()["body"] == body


def test_chats_are_routed_by_their_last_turn(ask):
    """Text in parts is text, and what was said before decides nothing; the expert's own template is named."""
    ask.router.tokenizer.chat_template = {
        "default": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "e1": "{{ messages[-1].content }}",
    }
    ask.router.templates.add("e1")
    choices = set()
    for text in ("one plus two", "hello", "def f():", "a", "b", "c", "d"):
        parts = [{"type": "text", "text": text}]
        before = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"}]
        turn = [{"role": "user", "content": text}]
        plain = ask("POST", "/v1/chat/completions", json={"model": "auto", "messages": turn})
        longer = [*before, {"role": "user", "content": parts}]
        inner = ask("POST", "/v1/chat/completions", json={"model": "auto", "messages": longer})
        assert plain.headers["x-expert"] == inner.headers["x-expert"]
        assert inner.json()["body"]["messages"] == longer
        assert ("chat_template" in plain.json()["body"]) == (plain.headers["x-expert"] == "e1")
        choices.add(plain.headers["x-expert"])
    assert choices == {"e0", "e1"}, "one expert answers all, so this shows nothing"


def test_other_requests_pass(ask):
    """A named expert is not routed, keys are handed on, and `auto` stands first among the models."""
    headers = {"authorization": "Bearer secret"}
    answer = ask("POST", "/v1/completions", json={"model": "e0", "prompt": "a", "ignore_eos": False}, headers=headers)
    assert "x-expert" not in answer.headers and answer.json()["key"] == "Bearer secret"
    assert answer.json()["body"] == {"model": "e0", "prompt": "a", "ignore_eos": False, "stop_token_ids": [257]}
    assert [model["id"] for model in ask("GET", "/v1/models").json()["data"]] == ["auto", "e0", "e1"]
    assert ask("POST", "/tokenize", json={"prompt": "a"}).json() == {
        "path": "/tokenize",
        "key": None,
        "body": {"prompt": "a"},
    }


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "is no JSON"),
        (b"[1]", "is a JSON list"),
        (b'{"model": "auto"}', "routes `messages`, or a `prompt`"),
        (b'{"model": "auto", "prompt": [1, 2]}', "routes `messages`, or a `prompt`"),
        (b'{"model": "auto", "messages": [{"role": "system", "content": "a"}]}', "none has the role 'user'"),
    ],
)
def test_bad_requests(ask, body, message):
    answer = ask("POST", "/v1/chat/completions", content=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_limits_and_a_server_that_is_down(ask, monkeypatch):
    from channel_merged_vllm import proxy

    monkeypatch.setattr(proxy, "MAX_BODY", 10)
    assert ask("POST", "/v1/completions", content=b"x" * 11).status_code == 413
    answer = ask("GET", "/down")
    assert answer.status_code == 502 and "vLLM at http://vllm does not answer" in answer.json()["error"]["message"]
