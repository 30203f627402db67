"""Models pushed to the hub and fetched from it again, by huggingface_hub itself and a server on this machine."""

import json

import pytest
from hub_stand_in import TOKEN, running_hub
from huggingface_hub import constants

import sled
from sled.errors import CheckpointError, DownloadError, UploadError
from sled.export.forms import export_hf
from sled.models import fetch
from sled.models.hub import local_folder


@pytest.fixture(scope="module")
def server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A hub without repositories, where a token of ours may write. Large files go by Git LFS, not by Xet."""
    for name, value in dict(ENDPOINT=server.address, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE=False,
                            HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(tmp_path / "token"),
                            HUGGINGFACE_CO_URL_TEMPLATE=server.address + "/{repo_id}/resolve/{revision}/{filename}",
                            HF_STORED_TOKENS_PATH=str(tmp_path / "tokens")).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    server.files.clear()
    server.messages.clear()
    server.broken = None
    return server


@pytest.mark.parametrize("repo_id", ["me/model", "model"])
def test_a_model_comes_back_as_it_was_pushed(repo_id, hub, demo, tmp_path):
    at = demo.push_to_hub(repo_id, private=True, message="First")
    assert at.startswith(f"{hub.address}/me/model/commit/") and hub.private == {"me/model": True}
    assert hub.messages == ["First"]
    assert set(hub.files["me/model"]) == {path.name for path in demo.save(tmp_path / "here").iterdir()}
    again = sled.load("me/model")
    assert again.generate([7, 8], max_new_tokens=4).tokens == demo.generate([7, 8], max_new_tokens=4).tokens
    assert again.text.digest == demo.text.digest


def test_weights_of_an_earlier_model_are_replaced_and_other_files_stay(hub, demo):
    hub.files["me/model"] = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}",
                             "exit_heads.json": b"{}", "notes.md": b"mine"}
    hub.private["me/model"] = False
    demo.push_to_hub("me/model", private=True)  # it exists, and stays as it was
    assert hub.files["me/model"].keys() == {"config.json", "generation_config.json", "model.safetensors", "notes.md",
                                            "tokenizer.json", "tokenizer_config.json"}
    assert not hub.private["me/model"]


def test_the_command_exports_and_pushes_with_a_card(hub, command, tmp_path):
    status, _, said = command("export", "demo", "--out", str(tmp_path / "m"), "--push", "model", "--private",
                              "--license", "mit")
    assert status == 0 and f"pushed: {hub.address}/me/model/commit/" in said and hub.private["me/model"]
    files = hub.files["me/model"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert b'sled.load("me/model")' in files["README.md"] and json.loads(files["sled_export.json"])["form"] == "hf"
    for arguments in (["--private"], ["--form", "orbax", "--push", "me/other"]):
        status, _, said = command("export", "demo", "--out", str(tmp_path / "n"), *arguments)
        assert status == 1 and "has no meaning" in said and not (tmp_path / "n").exists()


@pytest.mark.parametrize("change, repo_id, says", [
    (dict(HF_TOKEN=""), "me/model", "nobody is logged in.*log in with `hf auth login`, or set HF_TOKEN"),
    (dict(HF_TOKEN="hf_" + "b" * 34), "me/model", "token that is no longer valid; log in with `hf auth login`"),
    (dict(), "you/model", "your token may not write to you/model; take a name of your own"),
    (dict(HF_HUB_OFFLINE=True), "me/model", "HF_HUB_OFFLINE is set; unset it and go online"),
    (dict(), "a/b/c", "'a/b/c' is no hub id; give one such as 'owner/name'"),
    (dict(), "", "'' is no hub id"),
    (dict(), 3, "3 is no hub id"),
    (dict(), "me/mo del", "is no hub id"),
    (dict(ENDPOINT="http://127.0.0.1:9"), "me/model", "see that the hub can be reached, and try again"),
    (dict(broken="/repos/create"), "me/model", "500 Internal Server Error.*see that the hub can be reached"),
    (dict(broken="/commit/"), "me/model", "500 Internal Server Error.*try again"),
])
def test_failures_say_what_to_do(change, repo_id, says, hub, demo, tmp_path, monkeypatch):
    for name, value in change.items():
        if name == "HF_TOKEN":
            monkeypatch.setenv(name, value)
        elif name == "broken":
            hub.broken = value
        else:
            monkeypatch.setattr(constants, name, value)
    for push in (lambda: demo.push_to_hub(repo_id), lambda: export_hf("demo", tmp_path / "m", push=repo_id)):
        with pytest.raises(UploadError, match=f"^{repo_id} could not be uploaded: .*{says}") as raised:
            push()
        assert "\n" not in str(raised.value) and not any(hub.files.values())
    assert (tmp_path / "m").exists() == (change == dict(broken="/commit/"))  # what was exported by then stays


def test_what_cannot_be_exported_makes_no_repository(hub, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match="no earlier export"):
        export_hf("demo", tmp_path / "mine", push="me/model")
    with pytest.raises(CheckpointError, match="is no folder here"):
        export_hf("./nowhere", tmp_path / "m", push="me/model")
    assert not hub.files


def test_a_connection_that_breaks_while_fetching_is_told(hub, demo):
    demo.push_to_hub("me/model")
    hub.broken = "/resolve/"
    with pytest.raises(DownloadError, match=r"^me/model is not in the local cache, and the hub is out of reach"):
        fetch("me/model")
    with pytest.raises(DownloadError, match="me/none is not on the hub, or private"):
        fetch("me/none")


@pytest.mark.parametrize("name, says", [
    ("model.gguf", "GGUF is not read"), ("model.safetensors", "folder that holds it")])
def test_a_file_is_no_folder(name, says, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{name}' is a file; .*{says}"):
        local_folder(tmp_path / name)
