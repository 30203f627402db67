"""Models on the Hugging Face hub: fetched into huggingface_hub's cache, or put there."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
from collections.abc import Iterator
from pathlib import Path

from sled.errors import CheckpointError, DownloadError, UploadError
from sled.io import first_line, path_of, shown

# Not "*.safetensors": some repositories hold the same weights twice, under other names.
WANTED = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
          "model-*-of-*.safetensors", "exit_heads.json", "exit_heads.safetensors", "*token*.json",
          "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "additional_chat_templates/*.jinja")
CONFIG = ("config.json", "generation_config.json", "exit_heads.json")
# Of an earlier model in a repository: a loader would take them for the new one's.
REPLACED = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "exit_heads.*")


def folder_of(source, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model: "demo", a folder, or a hub id, then downloaded; weights: with these."""
    return local_folder(source) or fetch(os.fspath(source), revision=revision, weights=weights)


def local_folder(source) -> Path | None:
    """The folder of a model that is here; None for a hub id. Raises CheckpointError for what can be neither."""
    if source == "demo":
        return Path(str(importlib.resources.files("sled.demo"))) / "model"
    path = path_of("source", source)
    if path.is_dir():
        return path
    text = os.fspath(source)
    if path.is_file():
        raise CheckpointError(f"{shown(text, 200)} is a file; " + (
            "GGUF is not read, give the Hugging Face folder that it was made from" if path.suffix == ".gguf" else
            "give the folder that holds it, with config.json and safetensors"))
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(
            f"{shown(text, 200)} is no folder here, and is taken for a model on the hub only with its owner, as "
            "owner/name; give a folder with config.json and safetensors, an id such as 'openai-community/gpt2', or "
            "'demo'")
    return None


def fetch(hub_id: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of `hub_id` ("owner/name") at `revision` (branch, tag or commit).

    Downloads what the cache lacks (configuration, safetensors, tokenizer; no pickles, no code); without
    a network, or with HF_HUB_OFFLINE=1, the cache alone serves. Without `weights` it is the configuration
    alone. Raises DownloadError where the model does not exist, is gated, has no safetensors, or can be had
    neither from hub nor cache.
    """
    from huggingface_hub import errors, snapshot_download  # imported here: it is slow, and not always needed

    what = hub_id if revision is None else f"{hub_id} at revision {revision}"
    reasons = {  # the first that fits
        errors.GatedRepoError: f"{hub_id} is gated; accept its terms on https://huggingface.co/{hub_id}, then log in "
                               "with `hf auth login`",
        errors.RepositoryNotFoundError: f"{hub_id} is not on the hub, or private; check the spelling, or log in with "
                                        "`hf auth login`",
        errors.RevisionNotFoundError: f"{hub_id} has no revision {revision!r}; see its branches on "
                                      f"https://huggingface.co/{hub_id}/tree/main",
        errors.HFValidationError: f"{hub_id!r} is neither a folder nor a hub id; give a path, or an id such as "
                                  "'owner/name'",
        errors.LocalEntryNotFoundError: f"{what} is not in the local cache, and the hub is out of reach (or "
                                        "HF_HUB_OFFLINE is set); go online, or give a local folder"}
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(WANTED if weights else CONFIG),
                                        ignore_patterns=["*/*.json", "*/*.safetensors"]))
    except Exception as error:  # of many kinds, and in huggingface_hub 1 and 2 not all an OSError
        other = f"{what} could not be fetched ({first_line(error)}); try again, or give a local folder"
        raise DownloadError(next((said for kind, said in reasons.items() if isinstance(error, kind)), other)) from None
    if weights and not list(folder.glob("*.safetensors")):
        raise DownloadError(f"{what} has no safetensors, and pickles are not loaded; try revision "
                            "'refs/pr/1' (often a conversion), or convert it with save_pretrained")
    return folder


def create_repository(repo_id: str, *, private: bool | None = None) -> str:
    """Makes a model repository on the hub, if it is not there; returns "owner/name", for a name alone the user's own.

    private: of a new one, whether only its owner sees it; None: as the owner's account has it.
    Raises UploadError, and says what to do, where the hub does not let us or is out of reach.
    """
    from huggingface_hub import HfApi

    with _uploading(repo_id):
        return HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id


def upload(folder: Path, repo_id: str, message: str) -> str:
    """Puts a model's folder into a repository as one commit, whose address it returns. Raises UploadError."""
    from huggingface_hub import HfApi

    with _uploading(repo_id):
        return str(HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message,
                                         delete_patterns=list(REPLACED)))


@contextlib.contextmanager
def _uploading(repo_id: str) -> Iterator[None]:
    """Makes an UploadError of whatever huggingface_hub raises."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, (errors.HFValidationError, TypeError)):
            why, remedy = f"{repo_id!r} is no hub id", "give one such as 'owner/name'"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            why, remedy = "HF_HUB_OFFLINE is set", "unset it and go online"
        elif isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
            why, remedy = "nobody is logged in to the hub, or with a token that is no longer valid", (
                "log in with `hf auth login`, or set HF_TOKEN, with a token that may write")
        elif status in (403, 404):
            why, remedy = f"your token may not write to {repo_id}", (
                "take a name of your own, or log in with a token that may write (`hf auth login`)")
        else:
            why, remedy = first_line(error), "see that the hub can be reached, and try again"
        raise UploadError(f"{repo_id} could not be uploaded: {why}; {remedy}") from error
