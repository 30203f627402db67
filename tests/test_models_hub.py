"""Fetching from the hub: what is asked for, and what is said when it cannot be had. No network needed."""

import subprocess
import sys
import time
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from sled.errors import DownloadError
from sled.models import fetch

WANTED = {"config.json", "generation_config.json", "model.safetensors", "model-00001-of-00004.safetensors",
          "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"}


def test_the_folder_is_returned_and_only_model_files_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_text("")
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("owner/name", "v1") == tmp_path
    (hub_id,), asked = download.call_args
    assert hub_id == "owner/name" and asked["revision"] == "v1"
    files = [*WANTED, "consolidated.safetensors", "pytorch_model.bin", "modeling.py"]
    assert set(filter_repo_objects(files, allow_patterns=asked["allow_patterns"])) == WANTED


def http(kind):
    # Made without a response: its constructor differs between versions of huggingface_hub.
    return kind.__new__(kind)


@pytest.mark.parametrize("error, says", [
    (http(errors.GatedRepoError),
     "owner/name is gated; accept its terms on https://huggingface.co/owner/name"),
    (http(errors.RepositoryNotFoundError), "owner/name is not on the hub, or private; check the spelling"),
    (http(errors.RevisionNotFoundError), "owner/name has no revision 'v1'; see its branches"),
    (errors.LocalEntryNotFoundError("gone"), "revision v1 is not in the local cache, .* go online"),
    (OSError("disk full\nand more"),
     r"owner/name at revision v1 could not be fetched \(disk full\); try again"),
    (None, "owner/name at revision v1 has no safetensors, and pickles are not loaded; try"),
])
def test_failures_say_what_to_do(error, says, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error, return_value=str(tmp_path)))
    with pytest.raises(DownloadError, match=says) as raised:
        fetch("owner/name", "v1")
    assert "\n" not in str(raised.value)


def test_a_malformed_id_is_refused_by_the_real_client():
    with pytest.raises(DownloadError, match="'a/b/c' is neither a folder nor a hub id"):
        fetch("a/b/c")


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_network_the_real_client_fails_soon(environment, tmp_path):
    """In a process of its own: huggingface_hub reads its environment once. Port 9 refuses connections."""
    code = "from sled.models import fetch; fetch('nobody/nothing')"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env={"HF_HOME": str(tmp_path), "PATH": "",
                                                             **environment},
                          capture_output=True, text=True, timeout=60)
    assert time.monotonic() - start < 30
    assert "DownloadError: nobody/nothing is not in the local cache, and the hub is out of" in done.stderr
