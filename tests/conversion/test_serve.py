"""The command that serves a checkpoint: what it refuses before it loads anything, and how it stops."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest

import conversion.serve as door


def change_config(stored, **fields):
    file = stored.folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"].update(fields.pop("text_config", {}))
    file.write_text(json.dumps(config | fields))


@pytest.fixture
def chatty(stored, write_tokenizer):
    """A checkpoint with a chat template, room for long answers, no token that ends them and an untrained router."""
    write_tokenizer(stored.folder, chat=True)
    change_config(
        stored,
        text_config={"max_position_embeddings": 8192},
        expert_eos_token_ids={name: [] for name in stored.config.expert_names},
    )
    return stored


def refused(run, *arguments):
    """The one line that the command says."""
    code, out, err = run("serve", *arguments, "--device", "cpu", "--port", "0")
    assert code == 2 and not out
    *_, line = err.strip().splitlines()
    assert line.startswith("Error: ")
    return line


def test_what_cannot_be_served(run, stored, chatty, monkeypatch, tmp_path):
    """Said in one line, as everywhere."""
    assert "no such" in refused(run, tmp_path / "nowhere").lower() or "nowhere" in refused(run, tmp_path / "nowhere")
    assert "max_body is '1XB'" in refused(run, chatty.folder, "--max-body", "1XB")
    assert "dtype is 'int4', expected one of auto" in refused(run, chatty.folder, "--dtype", "int4")
    assert "the API key is empty" in refused(run, chatty.folder, "--api-key", "")
    change_config(stored, expert_names=["auto", "math", "code"], expert_eos_token_ids=None, router={"layers": 1})
    assert "has an expert 'auto', the name by which requests ask" in refused(run, stored.folder)
    monkeypatch.setattr(door, "is_serve_available", lambda: False)
    assert "pip install 'channel-merged[serve]'" in refused(run, chatty.folder)


def test_a_checkpoint_without_a_chat_template(run, stored):
    assert "has no chat template, and a server answers chats" in refused(run, stored.folder)


def test_an_address_that_is_taken(run, tmp_path):
    """Said before the checkpoint is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = run("serve", tmp_path / "nowhere", "--port", port)
    assert code == 2 and f"Error: 127.0.0.1:{port}: " in err and err.count("\n") == 1


@pytest.fixture
def start(chatty):
    """Start the command in a process of its own: the process and a client of it."""
    processes = []

    def begin(*options):
        command = [sys.executable, "-m", "conversion", "serve", str(chatty.folder), "--port", "0", "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["CHANNEL_MERGE_API_KEY"] = "secret"
        process = subprocess.Popen(
            [*command, "--cache-tokens", "8192", "--max-tokens", "8000", *options],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+/v1", line)))
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=20)
        return process, client

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def long_stream(client, tokens):
    return client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "two plus three"}], max_tokens=tokens, stream=True
    )


def test_sigterm_lets_answers_be_finished(start):
    """The command then ends without an error; the key came from the environment."""
    process, client = start("--grace", "100")
    with client:
        stream = long_stream(client, 400)
        first = next(stream)
        assert first.routing["expert"] == "instruct" and first.routing["fallback"] == "the router is untrained"
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.choices[0].finish_reason == "length" and last.usage.completion_tokens == 400
    rest = process.stderr.read()
    assert process.wait(60) == 0 and "the server has stopped" in rest and "Traceback" not in rest


@pytest.mark.slow
def test_ctrl_c_ends_it_when_the_time_is_over(start):
    process, client = start("--grace", "0")
    with client:
        stream = long_stream(client, 8000)
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    rest = process.stderr.read()
    assert process.wait(60) == 0 and "the server has stopped" in rest and "Traceback" not in rest
