"""A server as its clients see it: answers are those of `generate`, by the expert that is asked for or routed to."""

import itertools
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from conversion.router.choices import choose_experts
from conversion.serving.answers import CPU_CACHE_TOKENS, ExpertGenerationState
from conversion.vocabulary.expert_tokenizer import end_of_answer, until_end
from conversion.vocabulary.prompts import encode_prompts, router_queries

EXPERTS = ("math", "code", "chinese")
QUESTIONS = ["two plus three", "def", "再来一次 🙂", "x", "What is a prime?", "return the list", "今天星期几", "0"]


def user(text):
    return [{"role": "user", "content": text}]


def reference(served, messages, expert, max_new_tokens):
    """Tokens and text of `generate`, greedily."""
    tokenizer = served.manager.experts[expert]
    input_ids = torch.tensor([tokenizer.encode(messages, chat=True)])
    sequence = served.manager.model.generate(
        input_ids=input_ids, expert_index=expert, max_new_tokens=max_new_tokens, do_sample=False
    )
    tokens = sequence[0, input_ids.shape[1] :].tolist()
    return tokens, tokenizer.decode(until_end(tokens, end_of_answer(served.manager.model, expert)))


def routed(served, messages):
    """Expert and probability, as the router gives them for the checkpoint's default template."""
    queries = router_queries([messages], served.manager.config)
    inputs = encode_prompts(served.manager.tokenizer, queries, chat=True)
    (expert,), (probability,), _ = choose_experts(served.manager.model, inputs, whole=True)
    return expert, probability


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_chat_is_answered_as_by_generate(served, client, expert):
    """Text, usage and the reason of the end, at once and in pieces; code has end tokens of its own."""
    tokens, text = reference(served, user(QUESTIONS[0]), expert, 40)
    ended = tokens[-1] in end_of_answer(served.manager.model, expert)
    assert ended == (expert == "code")
    asked = {"model": expert, "messages": user(QUESTIONS[0]), "max_tokens": 40}
    answer = client.chat.completions.create(**asked)
    assert answer.model == expert and answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == ("stop" if ended else "length")
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.prompt_tokens == len(served.manager.experts[expert].encode(user(QUESTIONS[0]), chat=True))
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 4 and {chunk.model for chunk in chunks} == {expert}
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].usage == answer.usage


def test_an_answer_that_ends_with_its_last_allowed_token_is_not_cut_short(served, client):
    tokens, text = reference(served, user(QUESTIONS[0]), "code", 40)
    answer = client.chat.completions.create(model="code", messages=user(QUESTIONS[0]), max_tokens=len(tokens))
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content == text
    answer = client.chat.completions.create(model="code", messages=user(QUESTIONS[0]), max_tokens=len(tokens) - 1)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_response_is_answered_as_by_generate(served, client, expert):
    """The other endpoint, by a text and by messages; one that is cut short is incomplete."""
    tokens, text = reference(served, user(QUESTIONS[1]), expert, 30)
    cut = len(tokens) == 30
    for given in (QUESTIONS[1], user(QUESTIONS[1]), user([{"type": "input_text", "text": QUESTIONS[1]}])):
        answer = client.responses.create(model=expert, input=given, max_output_tokens=30)
        assert answer.output_text == text and answer.model == expert and answer.routing["expert"] == expert
        assert answer.usage.output_tokens == len(tokens)
        assert answer.status == ("incomplete" if cut else "completed")
    events = list(client.responses.create(model=expert, input=QUESTIONS[1], max_output_tokens=30, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].type == ("response.incomplete" if cut else "response.completed")
    assert events[-1].response.output_text == text and events[-1].response.routing == answer.routing
    assert events[-1].response.usage == answer.usage


def test_instructions_are_a_system_message(served, client):
    messages = [{"role": "system", "content": "be brief"}, *user(QUESTIONS[0])]
    _, text = reference(served, messages, "math", 20)
    answer = client.responses.create(model="math", input=QUESTIONS[0], instructions="be brief", max_output_tokens=20)
    assert answer.output_text == text
    messages[0]["role"] = "developer"
    answer = client.chat.completions.create(model="math", messages=messages, max_tokens=20)
    assert answer.choices[0].message.content == text


def test_auto_routes_by_the_last_user_turn(served, client):
    """Also under the checkpoint's own name; the answer says who it is and how sure the router was."""
    experts = set()
    for question, name in zip(QUESTIONS, itertools.cycle(("auto", "trio"))):
        expert, probability = routed(served, user(question))
        experts.add(expert)
        messages = [*user("something else"), {"role": "assistant", "content": "well"}, *user(question)]
        _, text = reference(served, messages, expert, 16)
        raw = client.chat.completions.with_raw_response.create(model=name, messages=messages, max_tokens=16)
        answer = raw.parse()
        assert answer.choices[0].message.content == text and answer.model == expert
        assert answer.routing["expert"] == expert == raw.headers["x-expert"] and answer.routing["fallback"] is None
        assert answer.routing["probability"] == pytest.approx(probability, abs=1e-4)
        assert float(raw.headers["x-expert-probability"]) == pytest.approx(probability, abs=1e-4)
    assert len(experts) > 1


def test_a_stream_says_who_answers_from_its_first_piece(served, client):
    expert, probability = routed(served, user(QUESTIONS[2]))
    messages = user(QUESTIONS[2])
    with client.chat.completions.create(model="auto", messages=messages, max_tokens=3, stream=True) as stream:
        first = next(iter(stream))
        assert stream.response.headers["x-expert"] == expert
    assert first.routing["expert"] == expert and first.routing["probability"] == pytest.approx(probability, abs=1e-4)
    named = client.chat.completions.create(model="math", messages=messages, max_tokens=1)
    assert named.routing == {"expert": "math", "probability": None, "fallback": None}


def test_thirty_two_clients_at_once(served, monkeypatch):
    """Every one gets the answer of `generate`, out of batches in which experts are mixed."""
    cb, mixed = served.state.get_manager()._cb, []
    step = cb._generation_step

    def recorded():
        requests = cb.batch_processor.inputs_and_outputs.requests_in_batch
        mixed.append({request.state.choice.expert_name for request in requests})
        step()

    monkeypatch.setattr(cb, "_generation_step", recorded)
    asked = list(itertools.islice(itertools.product(QUESTIONS, (*EXPERTS, "auto")), 32))
    expected = [
        reference(served, user(question), routed(served, user(question))[0] if model == "auto" else model, 24)[1]
        for question, model in asked
    ]

    def ask(number):
        question, model = asked[number]
        same_id = {"x-request-id": "the same for all"}
        with served.client() as client:
            if number % 3 == 0:
                answer = client.responses.create(
                    model=model, input=question, max_output_tokens=24, extra_headers=same_id
                )
                return answer.output_text
            answer = client.chat.completions.create(
                model=model, messages=user(question), max_tokens=24, stream=number % 3 == 1, extra_headers=same_id
            )
            if number % 3 == 1:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            return answer.choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == expected
    assert any(len(experts) == 3 for experts in mixed)
    served.wait_until_idle()


def test_a_seed_gives_the_same_answer_in_any_company(client):
    """A sampled answer is that of its seed, alone and among others; greedy ones stay greedy beside them."""

    def ask(options):
        answer = client.chat.completions.create(model="math", messages=user("x"), max_tokens=20, **options)
        return answer.choices[0].message.content

    greedy, sampled = ask({}), [ask({"temperature": 1, "seed": seed}) for seed in range(4)]
    assert len({greedy, *sampled}) == 5
    options = [
        {},
        *({"temperature": 1, "seed": seed} for seed in range(4)),
        {"temperature": 0, "seed": 0},
        {"temperature": 1e-9},
        {"temperature": 2, "top_p": 1e-6},
    ]
    with ThreadPoolExecutor(len(options)) as pool:
        assert list(pool.map(ask, options)) == [greedy, *sampled, greedy, greedy, greedy]
    assert len({ask({"temperature": 1}) for _ in range(3)}) > 1


def test_what_a_request_leaves_out_is_as_the_checkpoint_has_it(served, client, monkeypatch):
    """One whose generation config samples does so, with its temperature and top-k; 0 is greedy even then."""
    defaults = {"do_sample": True, "temperature": 0.8, "top_k": 3}
    asked = {"model": "math", "messages": user("x"), "max_tokens": 20, "seed": 5}
    greedy = client.chat.completions.create(**asked).choices[0].message.content
    hot = client.chat.completions.create(**asked, temperature=0.8).choices[0].message.content
    for name, value in defaults.items():
        monkeypatch.setattr(served.manager.model.generation_config, name, value)
    few = client.chat.completions.create(**asked).choices[0].message.content
    assert len({greedy, hot, few}) == 3
    assert client.chat.completions.create(**asked, temperature=0.8).choices[0].message.content == few
    assert client.chat.completions.create(**asked, temperature=0).choices[0].message.content == greedy


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_ends_before_a_stop_string(served, client, stream):
    """Wherever it stands, also across pieces; nothing of it is sent, and its place in the batch is free at once."""
    tokens, text = reference(served, user("x"), "math", 60)
    for stop in (text[20:23], [text[30], "never in it", text[20:26]]):
        stops = [stop] if isinstance(stop, str) else stop
        end = min(place for place in map(text.find, stops) if place >= 0)
        answer = client.chat.completions.create(
            model="math", messages=user("x"), max_tokens=1000, stop=stop, stream=stream
        )
        if stream:
            chunks = list(answer)
            said, reason = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0]
        else:
            said, reason = answer.choices[0].message.content, answer.choices[0]
        assert said == text[:end] and reason.finish_reason == "stop"
        served.wait_until_idle()


def test_models(client):
    """Every name that requests may give, and the checkpoint's own."""
    assert [model.id for model in client.models.list()] == ["auto", *EXPERTS]
    assert client.models.retrieve("code").id == "code" and client.models.retrieve("trio").owned_by == "trio"
    with pytest.raises(openai.NotFoundError, match="there is no model 'physics': this server has auto, math"):
        client.models.retrieve("physics")


BAD = {
    "unknown model": ({"model": "physics"}, 404, "model", "there is no model 'physics'"),
    "model is no name": ({"model": 3}, 404, "model", "there is no model 3"),
    "no messages": ({"messages": []}, 400, "messages", r"messages is \[\], expected a list"),
    "message of text": ({"messages": ["hello"]}, 400, "messages[0]", "expected role and content"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]", "role is 'tool'"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages[0]", "content is None, expected text"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        *(400, "messages[0]", "a part of type 'image_url', expected text"),
    ),
    "no query": ({"model": "auto", "messages": [{"role": "system", "content": "x"}]}, 400, "messages", "no query"),
    "system role refused": (
        {"model": "code", "messages": [{"role": "system", "content": "be kind"}, *user("x")]},
        *(
            400,
            "messages",
            r"expert 'code' has no system role \(the chat template 'code' does not take messages of the roles",
        ),
    ),
    "system role lost": (
        {"model": "chinese", "messages": [{"role": "system", "content": "be kind"}, *user("x")]},
        *(400, "messages", r"expert 'chinese' has no system role \(it leaves system messages out\)"),
    ),
    "long prompt": ({"messages": user("x" * 2100)}, 400, "messages", "has 2107 tokens, and this server takes 2048"),
    "long answer": ({"max_tokens": 1501}, 400, "max_tokens", "max_tokens is 1501, and this server gives at most 1500"),
    "both too long": (
        {"messages": user("x" * 1000), "max_completion_tokens": 1200},
        *(400, "max_completion_tokens", "is 1200 and the conversation has 1007 tokens, and this server takes 2048"),
    ),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0, expected a number of at least 1"),
    "half a token": ({"max_tokens": 1.5}, 400, "max_tokens", "max_tokens is 1.5"),
    "hot": ({"temperature": 3}, 400, "temperature", "temperature is 3, expected a number from 0 to 2"),
    "warm text": ({"temperature": "warm"}, 400, "temperature", "temperature is 'warm'"),
    "top_p": ({"top_p": 0}, 400, "top_p", "top_p is 0, expected a number above 0"),
    "seed": ({"seed": 2**70}, 400, "seed", "expected a whole number"),
    "stream": ({"stream": "yes"}, 400, "stream", "stream is 'yes'"),
    "stops": ({"stop": ["a", ""]}, 400, "stop", "expected a text or up to 4"),
    "two answers": ({"n": 2}, 400, "n", "n cannot be used with this server"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools", "tools cannot be used"),
    "unknown field": ({"expert": "math"}, 400, "expert", "unknown field 'expert'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_answered(served, client, case):
    """Says which field is at fault, in OpenAI's errors; the server goes on."""
    fields, status, param, message = BAD[case]
    body = {"model": "math", "messages": user("x"), **fields}
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.status_code == status and refused.value.param == param
    assert refused.value.type == ("not_found_error" if status == 404 else "invalid_request_error")
    assert not served.running()


@pytest.mark.parametrize(
    "given",
    [None, 5, [], [5], [{"type": "function_call"}], [{"type": "file", "x": 1}], [{"role": "user", "content": 5}]],
)
def test_input_that_is_no_conversation(client, given):
    with pytest.raises(openai.APIStatusError, match="input") as refused:
        client.post("/responses", body={"model": "math", "input": given}, cast_to=object)
    assert 400 <= refused.value.status_code < 500


def test_neutral_fields_are_as_if_left_out(client):
    """What asks for nothing is no error: clients send such fields by themselves."""
    answer = client.chat.completions.create(
        model="math",
        messages=user("x"),
        max_tokens=2,
        n=1,
        presence_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        user="somebody",
        stop=None,
        temperature=None,
    )
    assert answer.choices[0].message.content


def raw_request(served, body: bytes, headers=(), method="POST", path="/v1/chat/completions") -> tuple[int, dict]:
    """Status and JSON of an answer to bytes that no client would send."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json", "connection: close", *headers]
    if not any(line.startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


KEY = "authorization: Bearer a key"


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b'"x"', b"", b"\xff\xfe", b"[" * 9000, b'{"seed": ' + b"9" * 5000 + b"}"], ids=range(7)
)
def test_a_body_that_is_no_json_object(served, body):
    status, content = raw_request(served, body, [KEY])
    assert status == 400 and content["error"]["type"] == "invalid_request_error"
    assert content["error"]["message"]


def test_a_body_that_is_too_large_is_not_read(served):
    """Neither where its length is said nor where it comes in chunks."""
    status, content = raw_request(served, b"", [KEY, "content-length: 999999999"])
    assert status == 413 and "larger than 20,000 bytes" in content["error"]["message"]
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    status, content = raw_request(served, chunk * 2, [KEY, "transfer-encoding: chunked"])
    assert status == 413 and content["error"]["code"] == "request_too_large"


def test_paths_that_are_not_there(served):
    for path in ("/v1/nothing", "/load_model", "/reset", "/docs", "/v1/systemone"):
        status, content = raw_request(served, b"{}", [KEY], path=path)
        assert status == 404 and content["error"]["type"] == "not_found_error", path
    assert raw_request(served, b"", [KEY], method="GET")[0] == 405


def test_the_key(served):
    """Without it nothing is answered but the health."""
    for key in ("another key", "a keys"):
        with served.client(api_key=key) as client:
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                client.models.list()
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(model="math", messages=user("x"))
    assert raw_request(served, b"{}")[0] == 401
    assert raw_request(served, b"", method="GET", path="/health") == (200, {"status": "ok"})


@pytest.fixture
def cancelled(served, monkeypatch):
    """Requests that were cancelled, in order."""
    cb, requests = served.state.get_manager()._cb, []
    cancel = cb.cancel_request
    monkeypatch.setattr(cb, "cancel_request", lambda request: (requests.append(request), cancel(request)))
    return requests


def test_a_client_that_leaves_a_stream_frees_its_place(served, client, cancelled):
    stream = client.chat.completions.create(model="math", messages=user("x"), max_tokens=1500, stream=True)
    next(iter(stream))
    assert len(served.running()) == 1
    stream.close()
    served.wait_until_idle()
    assert len(cancelled) == 1


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_client_that_does_not_wait_frees_its_place(served, cancelled, path):
    """It sent a request for one long answer and went."""
    asked = {"messages": user("x"), "max_tokens": 1500} if path.startswith("chat") else {"input": "x"}
    body = json.dumps({"model": "math", **asked}).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{KEY}\r\n"
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        while not served.running():
            time.sleep(0.01)
    served.wait_until_idle()
    assert len(cancelled) == 1


def test_clients_that_leave_at_any_moment_leave_nothing_behind(served, cancelled, monkeypatch):
    """Streams whose clients go before the first piece, or around it: what is begun is cancelled."""
    cb, begun = served.state.get_manager()._cb, []
    add = cb.add_request
    monkeypatch.setattr(cb, "add_request", lambda **asked: (begun.append(asked["request_id"]), add(**asked)))
    asked = {"model": "math", "messages": user("x"), "max_tokens": 1500, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{KEY}\r\n"
    port = int(served.url.rpartition(":")[2])
    for moment in range(30):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(moment / 1000)
    with served.client() as client:  # behind all of them in the line of those that are to be routed
        client.chat.completions.create(model="math", messages=user("x"), max_tokens=1)
    served.wait_until_idle()
    assert begun[-1] not in cancelled and set(begun[:-1]) == set(cancelled)


def test_clients_that_leave_do_not_change_the_answers_of_others(served, client):
    _, expected = reference(served, user("y"), "chinese", 120)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.chat.completions.create, model="chinese", messages=user("y"), max_tokens=120)
        for _ in range(6):
            with client.chat.completions.create(
                model="math", messages=user("x"), max_tokens=1500, stream=True
            ) as stream:
                next(iter(stream))
        assert waiting.result().choices[0].message.content == expected
    served.wait_until_idle()


def test_a_server_that_stops_finishes_what_it_began(checkpoint, serving):
    """A stream goes on to its end, and nobody else is let in."""
    with serving(checkpoint) as served, served.client() as client:
        expected = reference(served, user("x"), "math", 200)[1]
        stream = client.chat.completions.create(model="math", messages=user("x"), max_tokens=200, stream=True)
        chunks = [next(stream)]
        served.server.should_exit = True
        chunks += stream
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_a_server_that_stops_waits_no_longer_than_it_is_told(checkpoint, serving):
    with serving(checkpoint, grace=0) as served, served.client() as client:
        stream = client.chat.completions.create(model="math", messages=user("x"), max_tokens=1500, stream=True)
        next(stream)
        served.server.should_exit = True
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        served.wait_until_idle()


def test_a_fault_of_the_model_is_said_to_everyone(checkpoint, serving, monkeypatch):
    """The running answers, the next ones and the health: somebody must start the server anew."""
    with serving(checkpoint) as served, served.client() as client:

        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(served.manager.model.model, "forward", fail)
        with pytest.raises(openai.APIStatusError) as failed:
            client.chat.completions.create(model="math", messages=user("x"))
        assert failed.value.status_code == 503 and failed.value.type == "server_error"
        with pytest.raises(openai.APIStatusError) as failed:
            client.chat.completions.create(model="math", messages=user("x"), stream=True)
        assert failed.value.status_code == 503
        assert raw_request(served, b"", method="GET", path="/health")[0] == 503


def test_the_cache_of_keys_and_values_limits_a_conversation(checkpoint, serving):
    """One that could never run is refused; it would end all others."""
    with serving(checkpoint, cache_tokens=300) as served, served.client() as client:
        room = served.state.get_manager().max_request_tokens
        assert 300 <= room < 2048
        with pytest.raises(openai.BadRequestError, match=f"this server takes {room} together"):
            client.chat.completions.create(model="math", messages=user("x" * 100), max_tokens=room)
        answer = client.chat.completions.create(model="math", messages=user("x" * 100))
        assert answer.usage.total_tokens == room and answer.choices[0].finish_reason == "length"


def test_a_cache_on_a_cpu_leaves_memory_to_others(served):
    state = ExpertGenerationState(served.manager.model)
    try:
        assert CPU_CACHE_TOKENS <= state.get_manager().max_request_tokens < 2 * CPU_CACHE_TOKENS
    finally:
        state.shutdown()
