"""Pushing over HTTP and loading from there, each in a fresh process, against a Hub on this machine.

The server below speaks the part of the Hub's interface that huggingface_hub calls, with faults on demand. Large files
go by the basic LFS protocol, so clients run with HF_HUB_DISABLE_XET=1: the other way to send them needs the Hub's own
storage.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.convert import convert
from conversion.io.staged_folder import FILE_LIST
from conversion.merging.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds: far more than anything here takes
TOKEN = "hf_of_this_test"
LARGE = (".safetensors", ".bin", ".png")  # else a file is a part of the commit
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main")
COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
STORE = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")


class LocalHub:
    """What the server holds.

    Attributes:
        commits: of each repository, oldest first: (id, the files' contents by their names).
        large: contents of uploaded large files by their SHA-256, whether or not a commit has them.
        requests: "METHOD /path" of everything that was asked, in order; large files by "PUT large".
        unknown: those that no route answers.
        faults: what the next request that starts so meets, by that start: an HTTP status, "drop" (the connection
            ends in the middle of the body), or "hold" (`held` is set, and no answer comes).
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.faults: dict[str, list[int | str]] = {}
        self.held = threading.Event()
        self.released = threading.Event()
        self.lock = threading.Lock()

    def files(self, repo: str, revision: str | None = "main") -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a revision; None where there is none."""
        commits = self.commits.get(repo, [])
        found = commits[-1:] if revision in (None, "main") else [one for one in commits if one[0] == revision]
        return found[0] if found else None

    def count(self, start: str) -> int:
        return sum(request.startswith(start) for request in self.requests)

    def fault(self, request: str) -> int | str | None:
        for start, faults in self.faults.items():
            if faults and request.startswith(start):
                return faults.pop(0)
        return None


@contextmanager
def serve_hub():
    """A hub and its address, served by a thread."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        store = STORE.fullmatch(path)
        request = f"{self.command} large" if store else f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault in ("drop", "hold"):
            self.rfile.read(length // 2)
            self.close_connection = True
            if fault == "hold":
                self.hub.held.set()
                self.hub.released.wait(PATIENCE)
            return None
        body = self.rfile.read(length)
        if fault is not None:
            return self.send(fault, {"error": "a fault of this test"})
        if not store and self.command != "HEAD" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "no token"})
        for pattern, route in self.routes[self.command]:
            if match := pattern.fullmatch(path):
                with self.hub.lock:
                    return route(self, body, **match.groupdict())
        self.hub.unknown.append(request)
        return self.send(404, {"error": f"unknown: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str, repo: str, revision: str | None = None):
        """404 with the code by which the client tells a repository, a revision and a file apart."""
        if repo not in self.hub.commits:
            what = "Repo"
        elif self.hub.files(repo, revision) is None:
            what = "Revision"
        self.send(404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"})

    def create(self, body: bytes):
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        there = repo in self.hub.commits
        self.hub.commits.setdefault(repo, [(_hash(repo.encode(), "sha1"), {".gitattributes": b""})])
        self.send(409 if there else 200, {"url": f"http://{self.headers['Host']}/{repo}"})

    def check_card(self, body: bytes):
        self.send(200, {"errors": [], "warnings": []})

    def who(self, body: bytes):
        self.send(200, {"type": "user", "name": "me", "orgs": [], "auth": {}})

    def info(self, body: bytes, repo: str, revision: str | None = None):
        if (found := self.hub.files(repo, revision)) is None:
            return self.missing("Repo", repo, revision)
        commit, files = found
        siblings = [{"rfilename": name} for name in files]
        self.send(200, {"id": repo, "sha": commit, "private": True, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None):
        if (found := self.hub.files(repo, revision)) is None:
            return self.missing("Revision", repo, revision)
        inside = {name: data for name, data in found[1].items() if name.startswith(f"{folder or ''}/".lstrip("/"))}
        if not inside:
            return self.missing("Entry", repo, revision)
        self.send(200, [_entry(name, data) for name, data in inside.items()])

    def resolve(self, body: bytes, repo: str, revision: str, file: str):
        found = self.hub.files(repo, revision)
        if found is None or file not in found[1]:
            return self.missing("Entry", repo, revision)
        etag = _entry(file, found[1][file]).get("lfs", {}).get("oid") or _blob(found[1][file])
        self.send(200, found[1][file], {"X-Repo-Commit": found[0], "ETag": f'"{etag}"'})

    def preupload(self, body: bytes, repo: str):
        there = (self.hub.files(repo) or ("", {}))[1]
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            oid = _oid(file["path"], there[file["path"]]) if file["path"] in there else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": files})

    def batch(self, body: bytes, repo: str):
        objects = []
        for asked in json.loads(body)["objects"]:
            action = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{asked['oid']}"}}
            objects.append({**asked} if asked["oid"] in self.hub.large else {**asked, "actions": action})
        self.send(200, {"objects": objects})

    def store(self, body: bytes, oid: str):
        if _hash(body, "sha256") != oid:
            return self.send(400, {"error": "another file was announced"})
        self.hub.large[oid] = body
        self.send(200, b"")

    def commit(self, body: bytes, repo: str):
        head, files = self.hub.files(repo)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", head) != head:
            return self.send(412, {"error": "A commit has happened since."})
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = _hash(head.encode() + body, "sha1")
        self.hub.commits[repo].append((commit, files))
        self.send(200, {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{commit}", "commitOid": commit})

    routes = {
        "HEAD": [(RESOLVE, resolve)],
        "GET": [(RESOLVE, resolve), (INFO, info), (TREE, tree), (re.compile("/api/whoami-v2"), who)],
        "PUT": [(STORE, store)],
        "POST": [
            (re.compile("/api/repos/create"), create),
            (re.compile("/api/validate-yaml"), check_card),
            (PREUPLOAD, preupload),
            (BATCH, batch),
            (COMMIT, commit),
        ],
    }


def _hash(data: bytes, algorithm: str) -> str:
    return hashlib.new(algorithm, data).hexdigest()


def _blob(data: bytes) -> str:
    """Git's name of a file's content."""
    return _hash(b"blob %d\0" % len(data) + data, "sha1")


def _oid(name: str, data: bytes) -> str:
    return _hash(data, "sha256") if name.endswith(LARGE) else _blob(data)


def _entry(name: str, data: bytes) -> dict:
    """A file as the Hub lists it."""
    entry = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _hash(data, "sha256"), "size": len(data), "pointerSize": 130}
    return entry


@pytest.fixture
def hub():
    with serve_hub() as (hub, address):
        hub.address = address
        yield hub
        assert not hub.unknown, hub.unknown


@pytest.fixture
def client(hub, tmp_path):
    """Start Python with the hub as the Hub and a token, away from this machine's own caches and settings."""

    def start(*arguments: str, home: str = "home") -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / home), "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
        command, pipes = [sys.executable, *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
        return started[-1]

    started = []
    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()


@pytest.fixture
def run(client):
    """Run Python there to its end: exit code, output, errors."""

    def to_the_end(*arguments: str, **options) -> tuple[int, str, str]:
        process = client(*arguments, **options)
        output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output, errors

    return to_the_end


@pytest.fixture
def merged(make_experts, write_recipe, tmp_path) -> Path:
    """A checkpoint of two shards."""
    base, experts = make_experts("llama", 2)
    convert(parse_recipe(write_recipe(base, experts)), tmp_path / "merged", progress=False, max_shard_size="120KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 2
    return tmp_path / "merged"


PUSH = """
import sys
from conversion.__main__ import main

for folder in sys.argv[1:]:
    try:
        main(["push", folder, "me/merged", "--private"])
    except SystemExit as stop:
        print(stop.code or 0)
"""

LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

repository, results, *revisions, pushed = sys.argv[1:]
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision)
    inputs = tokenizer(["What is 1 + 1?"], return_tensors="pt")
    logits = [model(**inputs, expert_index=expert).logits for expert in range(2)]
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    torch.save({"logits": logits, "text": text}, f"{results}-{revision}.pt")
    assert type(model).__module__.startswith("transformers_modules.")
if pushed:
    model.push_to_hub(pushed, private=True)
    tokenizer.push_to_hub(pushed)
"""


def answers(folder: Path) -> dict:
    """What a fresh process must compute of a model, loaded from its folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(["What is 1 + 1?"])["input_ids"])
    with torch.no_grad():
        logits = [model(ids, expert_index=expert).logits for expert in range(2)]
    return {"logits": logits, "text": model.generate(ids, max_new_tokens=4, do_sample=False)}


def assert_same(file: Path, expected: dict) -> None:
    found = torch.load(file)
    for logits, right in zip(found["logits"], expected["logits"], strict=True):
        assert torch.equal(logits, right)
    assert torch.equal(found["text"], expected["text"])


def with_other_weights(folder: Path, copy: Path) -> Path:
    """A copy of a model in which one of the shards differs."""
    shutil.copytree(folder, copy)
    file = next(file for file in sorted(copy.glob("*.safetensors")) if "model.lm_head.rows.weight" in load_file(file))
    tensors = load_file(file)
    tensors["model.lm_head.rows.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.slow
def test_what_was_pushed_loads_by_its_revision(hub, run, merged, tmp_path, without_package):
    """Through a server that once fails and once drops the connection within a file; and from there `push_to_hub`.

    A second push sends only what has changed, and leaves what the first commit loads as it was.
    """
    hub.faults = {"POST /api/models/me/merged/preupload": [503], "PUT large": ["drop"]}
    other = with_other_weights(merged, tmp_path / "other")
    code, output, errors = run("-c", PUSH, str(merged), str(other))
    assert code == 0, errors
    (address, _, revision), (done,), (_, _, newer), (again,) = (line.split() for line in output.splitlines())
    assert (address, done, again) == (f"{hub.address}/me/merged", "0", "0")
    assert not any(hub.faults.values())
    assert hub.count("PUT large") == 4  # one of the first two files twice, and one of the other two
    assert [commit for commit, _ in hub.commits["me/merged"]][1:] == [revision, newer]
    here = {file.relative_to(merged).as_posix(): file.read_bytes() for file in merged.rglob("*") if file.is_file()}
    here.pop(FILE_LIST)
    assert hub.files("me/merged", revision)[1] == {".gitattributes": b"", **here}

    code, _, errors = run("-c", without_package + LOAD, "me/merged", "loaded", "main", revision, "me/again")
    assert code == 0, errors
    right = answers(merged)
    assert_same(tmp_path / f"loaded-{revision}.pt", right)
    assert_same(tmp_path / "loaded-main.pt", answers(other))
    assert not torch.equal(answers(other)["logits"][0], right["logits"][0])

    code, _, errors = run("-c", without_package + LOAD, "me/again", "again", "main", "", home="other-home")
    assert code == 0, errors
    assert_same(tmp_path / "again-main.pt", right)


def test_a_push_that_failed_goes_on_with_what_is_missing(hub, run, merged):
    """One line says so, and until then the repository shows nothing of it."""
    hub.faults = {"PUT large": [400]}
    code, output, errors = run("-c", PUSH, str(merged), str(merged))
    assert code == 0, errors
    failed, (_, _, revision), done = (line.split() for line in output.splitlines())
    assert (failed, done) == (["2"], ["0"])
    (line,) = [line for line in errors.splitlines() if line.startswith("Error")]
    assert line.startswith("Error: me/merged got no commit") and "the same command sends what is missing" in line
    assert "Traceback" not in errors
    assert [commit for commit, _ in hub.commits["me/merged"]][1:] == [revision]
    assert hub.count("PUT large") == 3
    assert {"model.safetensors.index.json", "config.json"} <= hub.files("me/merged")[1].keys()


def test_ctrl_c_commits_nothing(hub, client, merged):
    hub.faults = {"POST /api/models/me/merged/commit": ["hold"]}
    process = client("-m", "conversion", "push", str(merged), "me/merged")
    assert hub.held.wait(PATIENCE)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.splitlines()[-2:] == [
        "WARNING: the same command goes on with what me/merged does not have yet",
        "Stopped.",
    ]
    assert len(hub.commits["me/merged"]) == 1
