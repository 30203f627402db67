"""Checkpoints: whole, exact, of one run, and honest about damage. Runs are killed in test_train_trainer.py."""

import functools
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sled.errors import CheckpointError, SettingError
from sled.train.optimizers import rate_schedule
from sled.train.run import checkpoint
from sled.train.run.checkpoint import Checkpoints, complete_steps, load_checkpoint
from sled.train.run.named_arrays import checksums, named
from sled.train.run.resume import anything, check_resumable, same_rates

SETTINGS = {"steps": 100, "data": {"folder": "a", "mix": [1, 2]}}
NOISE = np.random.RandomState(0).standard_normal((30, 40)).astype(np.float32)  # it does not compress


def state(number):
    return {"weights": {"up": jnp.asarray(NOISE * number), "half": jnp.full(5, number, jnp.bfloat16)},
            "key": jax.random.key(number), "step": jnp.int32(number), "mask": jnp.array([True, False])}


def check_same(one, other):
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), named(one), named(other))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 10, 12 and 13. Do not change it."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, SETTINGS, save_every=2) as checkpoints:
        begun = [checkpoints.save(step, state(step), {"position": [step, None]}, force=step == 13)
                 for step in range(1, 14)]
    assert begun == [step % 2 == 0 or step == 13 for step in range(1, 14)]
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_the_latest_stay_and_come_back(saved):
    assert complete_steps(saved) == [10, 12, 13] and len(list(saved.iterdir())) == 3
    for step, number in ((None, 13), (10, 10)):
        for like in (state(0), jax.eval_shape(lambda: state(0))):
            restored = load_checkpoint(saved, like, step)
            check_same(restored.state, state(number))
            assert (restored.step, restored.host, restored.settings) == (number, {"position": [number, None]}, SETTINGS)
            assert restored.versions["jax"] == jax.__version__


def test_a_step_that_is_there_is_not_written_again_and_an_older_one_is_refused(copy):
    with Checkpoints(copy, SETTINGS, save_every=1) as checkpoints:
        written = (copy / "13" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
        assert checkpoints.save(13, state(13), {})
        assert (copy / "13" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == written
        with pytest.raises(CheckpointError, match=r"of step 13, so step 9 .* remove the checkpoints of the later"):
            checkpoints.save(9, state(9), {})


def test_leftovers_go_at_the_next_start(copy):
    (copy / "14.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (copy / "dropped-2" / "state").mkdir(parents=True)
    assert complete_steps(copy) == [10, 12, 13]
    with Checkpoints(copy, SETTINGS, save_every=1, keep=9) as checkpoints:
        checkpoints.save(14, state(14), {})
    assert sorted(path.name for path in copy.iterdir()) == ["10", "12", "13", "14"]


def test_a_folder_without_checkpoints_or_without_this_one(saved, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder of a run"):
            load_checkpoint(folder, state(0))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it holds those of 10, 12, 13"):
        load_checkpoint(saved, state(0), 7)


def test_another_models_state_is_refused_by_name(saved):
    like = state(0)
    like["weights"]["up"] = jnp.zeros((30, 41))
    like["mask"] = jnp.zeros(2, jnp.int32)
    like["new"] = like.pop("step")
    with pytest.raises(CheckpointError, match=r"another model or optimiser: mask is bool\[2\] there and int32\[2\] "
                                              r"here, new is only here, weights/up is float32\[30, 40\] there and "
                                              r"float32\[30, 41\] here, and 1 more; give the settings"):
        load_checkpoint(saved, like)


def test_other_settings_are_refused_by_name(saved):
    settings = {"steps": 120, "data": {"folder": "b", "mix": [1, 3]}, "seed": 0}
    with Checkpoints(saved, settings, save_every=1, keep=9, may_change={"data.folder": anything}) as checkpoints:
        with pytest.raises(CheckpointError, match=r"steps was 100 and is 120; data\.mix was \[1, 2\] and is \[1, 3\]; "
                                                  r"seed was None and is 0\. Give the settings it was made with"):
            checkpoints.restore(state(0))
    longer = {**SETTINGS, "steps": 120}
    with Checkpoints(saved, longer, save_every=1, keep=9, may_change={"steps": anything}) as checkpoints:
        assert checkpoints.restore(state(0)).step == 13


def test_what_has_a_digest_differs_by_it_and_what_follows_is_left_unsaid():
    then = {"data": {"name": "a", "digest": "1"}, "model": {"name": "new", "layers": 2}, "config": {"depth": 2}}

    def check(follow=None, **now):
        check_resumable("run", then, {**then, **now}, 5, {}, follow)

    check(data={"name": "moved", "digest": "1"})
    with pytest.raises(CheckpointError, match=r"settings: data\.limit was 1 and is 2[.]"):
        check_resumable("run", {"data": {"name": "a", "digest": "1", "limit": 1}},
                       {"data": {"name": "a", "digest": "2", "limit": 2}}, 5, {})
    for now, words in ((dict(data={"name": "b", "digest": "2"}), "settings: data was 'a' and is 'b'[.]"),
                       (dict(data={"name": "a", "digest": "2"}), "data is 'a' as before, but holds something else[.]"),
                       (dict(model={"name": "demo", "digest": "3"}), "settings: model was 'new' and is 'demo'[.]"),
                       (dict(model={"name": "new", "layers": 3}, config={"depth": 3}),
                        "settings: model.layers was 2 and is 3[.]"),
                       (dict(config={"depth": 4}), "config.depth was 2 and is 4"),
                       (dict(model=f"{'x' * 50}2{'y' * 50}"), "model was .* and is "),
                       (dict(data=None), "data was 'a' and is None"),
                       (dict(data={"name": "a", "digest": "2", "limit": 3}), "data is 'a' as before, but"),
                       (dict(model={"name": "b", "digest": "3"}, config={}),
                        "settings: model was 'new' and is 'b'[.]")):
        with pytest.raises(CheckpointError, match=words):
            check({"model": ["config"]}, **now)


def test_the_number_of_steps_may_change_while_the_past_stays_the_same():
    rule = same_rates(rate_schedule("warmup-stable-decay", 0.1, 100))

    def change(now, step):
        check_resumable("run", {"steps": 2000}, {"steps": now}, step, {"steps": rule})

    change(4000, 1499)
    change(1800, 1200)
    for now, step, reason in ((4000, 1700, "learning rate of step 1501"), (1000, 1200, "step 1200 is behind it"),
                              (500, 400, "learning rate of step 376"), (None, 60, "no number of steps")):
        with pytest.raises(CheckpointError, match=f"steps was 2000 and is {now} .*{reason}"):
            change(now, step)


@pytest.mark.parametrize("theirs, which", [(2, "a newer"), (4, "an older")])
def test_another_format_is_refused(theirs, which, copy, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", theirs)
    with pytest.raises(CheckpointError, match=rf"has format 3, but this sled reads format {theirs}; {which} sled"):
        load_checkpoint(copy, state(0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "metadata", "manifest", "record"])
def test_damage_is_told_with_the_older_checkpoint_to_take(copy, harm):
    data = max((copy / "13" / "state").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    if harm == "flip":  # one bit of a weight, which Orbax does not see
        at = len(whole) // 2
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    elif harm == "cut":
        data.write_bytes(whole[:100])
    elif harm == "remove":
        data.unlink()
    else:
        file = copy / "13" / {"metadata": "state/_METADATA", "manifest": "state/manifest.ocdbt",
                              "record": "_CHECKPOINT_METADATA"}[harm]
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"13 is damaged \(.*\); remove it, and step 12 is the latest"):
        load_checkpoint(copy, state(0))
    check_same(load_checkpoint(copy, state(0), 12).state, state(12))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning",
                            "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_loses_nothing_older(copy):
    """The limit on a file's size stands for the disk's."""
    large = {"noise": jax.random.normal(jax.random.key(0), (200, 200))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 14 could not be written \(.*File too large.* ones are whole"):
            with Checkpoints(copy, SETTINGS, save_every=1) as checkpoints:
                checkpoints.save(14, large, {})
                checkpoints.save(15, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert complete_steps(copy)[-1] == 13
    with Checkpoints(copy, SETTINGS, save_every=1) as checkpoints:
        checkpoints.save(15, large, {})
    assert complete_steps(copy)[-1] == 15 and all(path.name.isdecimal() for path in copy.iterdir())


def test_settings_out_of_range_and_states_that_cannot_be_saved(tmp_path):
    for wrong in ({"save_every": 0}, {"save_every": 1, "keep": 0}):
        with pytest.raises(SettingError, match=f"{list(wrong)[-1]} is "):
            Checkpoints(tmp_path, SETTINGS, **wrong)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file/run \(Not a directory\); give a folder"):
        Checkpoints(tmp_path / "file" / "run", SETTINGS, save_every=1)
    with pytest.raises(SettingError, match="settings cannot be written as JSON"):
        Checkpoints(tmp_path, {"rate": float("nan")}, save_every=1)
    with Checkpoints(tmp_path / "run", SETTINGS, save_every=1) as checkpoints:
        for held, host, words in (({"count": 3}, {}, "the state's count is 3, but only arrays"),
                                  (state(1), {"at": (1, 2)}, r"host is .* but would come back as \{'at': \[1, 2\]\}"),
                                  (state(1), {"at": np.int64(1)}, "host cannot be written as JSON")):
            with pytest.raises(SettingError, match=words):
                checkpoints.save(1, held, host)
        assert checkpoints.steps == []


def test_checksums_are_the_sum_of_words_times_odd_numbers():
    arrays = {"float": jnp.linspace(-3, 3, 35).reshape(5, 7), "half": jnp.arange(6, dtype=jnp.bfloat16),
              "bytes": jnp.arange(-5, 5, dtype=jnp.int8), "bool": jnp.array([True, False, True]),
              "scalar": jnp.float32(-0.0), "empty": jnp.zeros((0, 3))}

    def expected(array):
        words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
        return sum(int(word) * (2 * place + 1) for place, word in enumerate(words)) % 2**32

    assert checksums(arrays).tolist() == [expected(np.asarray(arrays[name])) for name in sorted(arrays)]
