"""`sled sweep`, and the page about sweeps."""

import dataclasses
from pathlib import Path

import pytest
from demo_toy import THREE
from scripted_sweep import run

import sled
from sled.errors import SettingError

pytest_plugins = ["scripted_sweep"]
pytestmark = pytest.mark.filterwarnings("ignore::sled.errors.EvaluationWarning")  # most sweeps here are tiny


@pytest.mark.parametrize("name", ["sweep.md", "sweep.png"])
def test_files_of_ones_own_are_not_replaced(sweep_command, scripted, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert sweep_command("-o", tmp_path, "--problems", 2) == 1
    assert f"--out is '{tmp_path}', which holds {name} that sled did not write" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine" and not scripted.calls and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SettingError, match="folder is"):
        run(scripted, tmp_path)


@pytest.mark.parametrize(("arguments", "made"), [
    (["-o", "new", "--exit-layers", "9"], False), (["-o", "new", "--rounds", "0"], False),
    (["-o", "new", "-n", "1000"], False), (["-o", "old/new", "--exit-layers", "9"], False),
    (["-o", "new", "--delta", "2"], False), (["-o", "new", "--problems", "2", "--thresholds", "0.9", "--drafts"], True),
])
def test_a_refused_run_leaves_no_folder(sweep_command, tmp_path, monkeypatch, arguments, made):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    assert sweep_command(*arguments) == 1 - made
    assert (tmp_path / "old").exists() and (tmp_path / "new").exists() == made
    assert not list((tmp_path / "old").iterdir())


def test_the_documentations_python_runs(sweep_command, scripted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sled, "load", lambda *_, **__: scripted)
    scripted.config = dataclasses.replace(THREE, num_layers=8, windows=THREE.windows[:1] * 8)
    text = (Path(sled.__file__).parents[1] / "docs" / "sweeps.md").read_text()
    blocks = text.split("```python\n")[1:]
    exec("\n".join(block.partition("```")[0] for block in blocks), {})
    assert len(blocks) == 2 and (tmp_path / "sweep" / "sweep.md").exists() and (tmp_path / "comparison.png").exists()


def test_the_command(sweep_command, scripted, tmp_path, capsys):
    assert sweep_command("-o", tmp_path, "--problems", 4, "--exit-layers", 1, "1,2", "--thresholds", 0.9, 0.5,
                         "--drafts", 2, "--draft-layers", 2, "--rates", 1, "--scales", 5, 10) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in (
        "no exit", "exit after 1, threshold 0.9", "exit after 1 2, threshold 0.5", "speculation after 2, draft 2",
        "SLED rate 1 scale 10, no exit"))
    assert (tmp_path / "sweep.md").read_text() == out and (tmp_path / "sweep.png").exists()
    scripted.calls.clear()
    (tmp_path / "own.jsonl").write_text('{"q": "0?", "a": 0}\n{"q": "1?", "a": 2}\n')
    assert sweep_command("-o", tmp_path / "own", "--data", tmp_path / "own.jsonl", "--prompt", "{q}", "--answer", "a",
                         "--thresholds", "--fusion", "sled", "--rate", 2) == 1
    assert "to choose layers by and are not asked; but there are 2: name the layers" in capsys.readouterr().err
    (tmp_path / "own.jsonl").write_text("".join(f'{{"q": "{n}?", "a": {n % 2}}}\n' for n in range(10)))
    assert sweep_command("-o", tmp_path / "own", "--data", tmp_path / "own.jsonl", "--prompt", "{q}", "--answer", "a",
                         "--thresholds", "--fusion", "sled", "--rate", 2) == 0
    own = (tmp_path / "own" / "sweep.md").read_text()
    assert "scripted, 2 questions of own.jsonl, the answer being the number behind the first ####, at most 144" in own
    assert own.count("| SLED rate 2 scale 10, speculation after") == 2 * 4  # layers x drafts


@pytest.mark.parametrize(("arguments", "says"), [
    (["--thresholds", "--drafts"], "nothing is left to sweep"), (["--rates", "1"], "--rates and --scales go together"),
    (["--thresholds", "--drafts", "--rates", "1", "--scales", "5", "--fusion", "dola"],
     "--fusion has no meaning without --thresholds or --drafts"),
    (["--thresholds", "--exit-layers", "1"], "--exit-layers has no meaning without --thresholds"),
    (["--drafts", "--draft-layers", "1"], "--draft-layers has no meaning without --drafts"),
    (["--problems", "0"], "count is 0"),
    (["--prompt", "q"], "--prompt is for --data, which was not given"),
    (["--num-fewshot", "2"], "--num-fewshot is for --data"), (["--fewshot", "x"], "--fewshot is for --data"),
    (["--data", "x.jsonl", "--prompt", "q", "--answer", "a", "--fewshot", "y"], "'y', but --num-fewshot is 0"),
    (["--stop", ""], "at least one character"), (["--data", "x.jsonl"], "without --prompt or --answer"),
    (["--data", "x.jsonl", "--prompt", "q", "--answer", "a"], "no file at 'x.jsonl'"),
    (["-m", "other"], "no questions were given for other"),
    (["--exit-layers", "9"], "--exit-layers is 9, but 9 is no early exit of a model of 3"),
    (["--draft-layers", "9"], "--draft-layers is 9"), (["--drafts", "0"], "--drafts is 0"),
    (["--thresholds", "0.9", "3"], "--thresholds is 3"),
    (["--thresholds", "2"], "--thresholds is 2"),
], ids=str)
def test_mistakes_are_named(sweep_command, tmp_path, capsys, arguments, says):
    assert sweep_command("-o", tmp_path, *arguments) == 1
    assert says in capsys.readouterr().err
