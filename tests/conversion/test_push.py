import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from conversion.__main__ import main
from conversion.convert import convert
from conversion.io.staged_folder import FILE_LIST
from conversion.merging.recipe import parse_recipe
from conversion.push import push_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Address(str):
    repo_id = "somebody/merged"


def repository(*files):
    return SimpleNamespace(sha="before", siblings=[SimpleNamespace(rfilename=file) for file in files])


@pytest.fixture
def hub(monkeypatch):
    """Calls of the Hub's client instead of the Hub: (name, arguments), in order."""
    calls = []

    def create_repo(self, repo_id, **arguments):
        calls.append(("create_repo", {"repo_id": repo_id, **arguments}))
        return Address("https://huggingface.co/somebody/merged")

    def create_commit(self, repo_id, operations, **arguments):
        calls.append(("create_commit", {"repo_id": repo_id, "operations": list(operations), **arguments}))
        return SimpleNamespace(oid=COMMIT)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo_id: repository(".gitattributes"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return calls


def names(operations, kind) -> set[str]:
    """What a commit adds or deletes."""
    return {part.path_in_repo for part in operations if isinstance(part, kind)}


@pytest.fixture
def merged(make_experts, write_recipe, tmp_path):
    base, experts = make_experts("llama", 2, num_hidden_layers=1)
    convert(parse_recipe(write_recipe(base, experts)), tmp_path / "merged", progress=False)
    return tmp_path / "merged"


def test_a_checkpoint_is_created_and_uploaded(hub, merged):
    """In this order, into the repository that the Hub named; every file goes that loading needs."""
    (merged / "__pycache__").mkdir()
    (merged / "__pycache__" / "modeling_channel_merged.cpython-311.pyc").write_text("")
    (merged / ".cache").mkdir()
    (merged / ".cache" / "state").write_text("")
    pushed = push_checkpoint(merged, "merged", private=True, message="First")
    assert [name for name, _ in hub] == ["create_repo", "create_commit"]
    created, committed = (arguments for _, arguments in hub)
    assert created == {"repo_id": "merged", "private": True, "repo_type": "model", "exist_ok": True}
    assert committed["repo_id"] == "somebody/merged" and committed["commit_message"] == "First"
    assert (pushed.url, pushed.revision) == ("https://huggingface.co/somebody/merged", COMMIT)
    files = {str(file.relative_to(merged)) for file in merged.rglob("*") if file.is_file()}
    sent = names(committed["operations"], CommitOperationAdd)
    hidden = {FILE_LIST, ".cache/state", "__pycache__/modeling_channel_merged.cpython-311.pyc"}
    assert sent == files - hidden
    assert {"config.json", "README.md", "model.safetensors", "modeling_channel_merged.py", "tokenizer.json"} <= sent
    for part in committed["operations"]:
        assert (merged / part.path_in_repo).read_bytes() == Path(part.path_or_fileobj).read_bytes()


def test_what_the_trainer_keeps_stays_here(hub, merged):
    """Its state for going on has pickles and local paths, its logs the machine's name."""
    for name in (
        "checkpoint-3/optimizer.pt",
        "checkpoint-3/training_args.bin",
        "runs/today/events",
        "training_args.bin",
    ):
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
        (merged / name).write_text("")
    push_checkpoint(merged, "somebody/merged")
    added = names(hub[1][1]["operations"], CommitOperationAdd)
    assert "model.safetensors" in added and not [name for name in added if "checkpoint" in name or "training" in name]
    assert "runs/now/events" not in added


def test_one_commit_deletes_what_the_new_checkpoint_does_not_have(hub, merged, monkeypatch, caplog):
    """An old model.safetensors beside new shards is what Transformers would load; the history keeps the old files."""
    old = [".gitattributes", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    old += ["experts/old/tokenizer.json", "pytorch_model.bin", "README.md"]
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo_id: repository(*old))
    with caplog.at_level("INFO", logger="conversion"):
        push_checkpoint(merged, "somebody/merged")
    _, (_, committed) = hub
    deleted = names(committed["operations"], CommitOperationDelete)
    assert deleted == {
        "experts/old/tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    }
    assert all(name in caplog.text for name in deleted)
    assert committed["parent_commit"] == "before"  # the Hub refuses a commit beside another one
    assert not deleted & names(committed["operations"], CommitOperationAdd)


@pytest.mark.parametrize("call", ["create_repo", "model_info", "create_commit"])
@pytest.mark.parametrize("error", [OSError("connection lost"), KeyboardInterrupt()], ids=["network", "ctrl-c"])
def test_a_push_that_fails_changes_nothing_here(hub, merged, monkeypatch, call, error):
    """And given again it makes the same calls."""
    before = {file: file.read_bytes() for file in merged.rglob("*") if file.is_file()}

    def fail(self, *args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, call, fail)
        with pytest.raises(type(error)):
            push_checkpoint(merged, "somebody/merged")
    assert {file: file.read_bytes() for file in merged.rglob("*") if file.is_file()} == before
    hub.clear()
    assert push_checkpoint(merged, "somebody/merged").revision == COMMIT
    assert [name for name, _ in hub] == ["create_repo", "create_commit"]


def remove_code(folder):
    (folder / "modeling_channel_merged.py").unlink()


def remove_card(folder):
    (folder / "README.md").unlink()


def break_metadata(folder):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")


def damage_index(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.lm_head.channel_index"][0, 0] = 10**6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def become_plain(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_code, "no modeling_channel_merged.py: without its code"),
        (remove_card, "no README.md"),
        (break_metadata, "the metadata of .*README.md cannot be read"),
        (damage_index, "lm_head.channel_index holds row 1000000"),
        (cut_weights, "cut short or damaged"),
        (become_plain, "not a channel-merged checkpoint"),
    ],
)
def test_what_is_not_whole_is_not_pushed(hub, merged, damage, message):
    """Checked before a repository is made."""
    damage(merged)
    with pytest.raises(ValueError, match=message):
        push_checkpoint(merged, "somebody/merged")
    assert not hub


@pytest.mark.parametrize("name", ["a/b/c", "", "somebody/mer ged", "-merged"])
def test_names_that_are_no_repositories(hub, merged, name):
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))} is no name of a repository"):
        push_checkpoint(merged, name)
    assert not hub


def test_a_folder_that_is_not_there(hub, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        push_checkpoint(tmp_path / "nowhere", "somebody/merged")
    assert not hub


def test_a_refusal_of_the_hub_is_one_line(hub, merged, monkeypatch, capsys):
    def refuse(self, repo_id, **arguments):
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise HfHubHTTPError("403 Forbidden:\nno rights", response=response)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(merged), "somebody/merged"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "Error: the Hub refused somebody/merged: 403 Forbidden: no rights\n"


def test_command(hub, merged, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["push", str(merged), "somebody/merged", "--public"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"https://huggingface.co/somebody/merged  revision {COMMIT}\n"
    assert hub[0][1]["private"] is False
