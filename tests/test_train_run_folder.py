"""Whose the folder of a run is, and that nothing of the user's is lost in it."""

import errno
import os

import pytest

from sled.errors import SettingError
from sled.train.data.sources import Source
from sled.train.initial_model import prepare_initial_model
from sled.train.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def put_config(folder: RunFolder, text="{}"):
    with folder.new_model_config() as config:
        (config / "config.json").write_text(text)


def check_refused(folder: RunFolder, words: str):
    with pytest.raises(SettingError, match=words), folder.claimed():
        raise AssertionError


def test_a_folder_is_claimed_by_one_run_at_a_time(folder):
    with folder.claimed():
        check_refused(RunFolder(folder.path), "a run is going on in .*run; wait for its end, or give another folder")
        put_config(folder)
    with folder.claimed():
        assert folder.is_run()


@pytest.mark.parametrize("held", ["notes.txt", "model_config/mine", "metrics.jsonl", "model/mine"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(folder, held):
    own = folder.path / held
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    check_refused(folder, f"holds '{held.partition('/')[0]}' but no run; give a new or empty folder")
    assert own.read_text() == "mine" and len(list(folder.path.rglob("*"))) == 1 + held.count("/")


def test_a_trained_model_without_its_checkpoints_is_not_overwritten(folder):
    with folder.claimed():
        put_config(folder)
    folder.model.mkdir()
    (folder.model / "config.json").touch()
    check_refused(folder, "holds a trained model, but none of the checkpoints to go on from")
    (folder.checkpoints / "5").mkdir(parents=True)
    with folder.claimed():
        pass


def test_where_locks_are_unknown_a_run_goes_without(folder, monkeypatch):
    for code in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        def refuse(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", refuse)
        with folder.claimed():
            put_config(folder)
        assert not [path for path in folder.path.iterdir() if path.name not in ("model_config", ".run.lock")]


def test_a_run_killed_before_its_form_stood_is_begun_anew(folder):
    """Also in the middle of putting another configuration in the place of an earlier one, and beside hidden files."""
    folder.path.mkdir()
    (folder.path / ".gitkeep").touch()
    (folder.path / ".run.lock").touch()
    (folder.path / ".unfinished-model_config").mkdir()
    (folder.path / ".unfinished-model_config" / "old.json").touch()
    (folder.path / ".unfinished-model_config" / "additional_chat_templates").mkdir()
    folder.metrics.touch()
    with folder.claimed():
        put_config(folder)
    assert [entry.name for entry in folder.model_config.iterdir()] == ["config.json"]
    assert folder.is_run() and (folder.path / ".gitkeep").exists()


def test_the_lock_of_a_run_that_failed_vouches_for_nothing(folder):
    folder.path.mkdir()
    with pytest.raises(ZeroDivisionError), folder.claimed():
        raise ZeroDivisionError
    assert list(folder.path.iterdir()) == []
    for name in (".run.lock", "notes.txt"):
        (folder.path / name).touch()
    check_refused(folder, r"holds 'notes\.txt' but no run")


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("long" * 100)):
        check_refused(RunFolder(path), r"which (is a file|cannot be written .*); give a folder of your own")


def test_where_each_process_has_a_folder_of_its_own_each_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    own, shared = RunFolder(tmp_path / "own", shared=False), RunFolder(tmp_path / "shared")
    assert own.writes and not shared.writes
    own.path.mkdir()
    with own.new_model_config() as config, shared.new_model_config() as theirs:
        prepare_initial_model("demo", Source("demo"), 8, config, resumed=False, writes=own.writes)
        prepare_initial_model("demo", Source("demo"), 8, theirs, resumed=False, writes=shared.writes)
    assert (own.model_config / "config.json").is_file() and not shared.path.exists()


def test_a_form_that_fails_leaves_the_earlier_one_and_a_run_that_fails_at_once_nothing(folder):
    with pytest.raises(ZeroDivisionError), folder.claimed(), folder.new_model_config():
        raise ZeroDivisionError
    assert not folder.path.exists()
    with folder.claimed():
        put_config(folder, "first")
    with pytest.raises(ZeroDivisionError), folder.claimed(), folder.new_model_config():
        raise ZeroDivisionError
    assert (folder.model_config / "config.json").read_text() == "first"
    assert {entry.name for entry in folder.path.iterdir()} <= {"model_config", ".run.lock"}
