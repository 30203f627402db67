"""Finds a model's folder: bundled, here, or on the Hugging Face hub, then fetched into huggingface_hub's cache."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from sled.errors import CheckpointError, DownloadError
from sled.io import first_line, path_of, shorten

# Not "*.safetensors": some repositories hold the same weights twice, under other names.
WANTED = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
          "model-*-of-*.safetensors", "exit_heads.json", "exit_heads.safetensors", "*token*.json",
          "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*", "additional_chat_templates/*.jinja")


def folder_of(source, revision: str | None = None) -> Path:
    """The local folder of a model: "demo", a folder, or a hub id, then downloaded."""
    if source == "demo":
        return Path(str(importlib.resources.files("sled.demo"))) / "model"
    path = path_of("source", source)
    if path.is_dir():
        return path
    text = os.fspath(source)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(
            f"{shorten(repr(text), 200)} is not a folder here, nor can it be a hub id (owner/name); "
            "give a folder with config.json and safetensors, a hub id, or 'demo'")
    return fetch(text, revision=revision)


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The local folder of `hub_id` ("owner/name") at `revision` (branch, tag or commit).

    Downloads what the cache lacks (configuration, safetensors, tokenizer; no pickles, no code); without
    a network, or with HF_HUB_OFFLINE=1, the cache alone serves. Raises DownloadError where the model
    does not exist, is gated, has no safetensors, or can be had neither from hub nor cache.
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
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(WANTED),
                                        ignore_patterns=["*/*.json", "*/*.safetensors"]))
    except (OSError, errors.HFValidationError) as error:  # OSError: every HTTP failure, a full disk, a dead proxy
        other = f"{what} could not be fetched ({first_line(error)}); try again, or give a local folder"
        raise DownloadError(next((said for kind, said in reasons.items() if isinstance(error, kind)), other)) from None
    if not list(folder.glob("*.safetensors")):
        raise DownloadError(f"{what} has no safetensors, and pickles are not loaded; try revision "
                            "'refs/pr/1' (often a conversion), or convert it with save_pretrained")
    return folder
