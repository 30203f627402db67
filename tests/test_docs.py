"""What the documentation names exists: modules, classes, functions, their arguments, commands and options, files."""

import ast
import contextlib
import inspect
import io
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from sled.cli import main
from sled.cli.commands import SLED

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(ROOT.glob("scripts/*.sh"))
NOTEBOOK = ROOT / "scripts" / "sled_colab.ipynb"
# Of an exported program, SLURM, gcloud and pip.
OF_OTHERS = {"--set", "--nodes", "--gpus-per-node", "--ntasks-per-node", "--job-name", "--output", "--kill-on-bad-exit",
             "--zone", "--worker", "--command", "--quiet"}
# Variables of the examples, by the classes whose methods they call.
VARIABLES = {"lm": "sled.LM", "big": "sled.LM", "math": "sled.LM", "engine": "sled.Engine", "lens": "sled.Lens",
             "record": "sled.Calibration"}


def _notebook() -> list[tuple[str, str]]:
    """(kind, text) of each of the notebook's cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES if
         page.name != "CHANGELOG.md"}  # which names what is gone, too
TEXTS["notebook"] = "\n".join(text for _, text in _notebook())
TEXTS |= {script.name: script.read_text(encoding="utf-8") for script in SCRIPTS}
CODE = [(name, block) for name, text in TEXTS.items()
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
CODE += [("notebook", re.sub(r"^ *%.*$", "    pass", text, flags=re.M)) for kind, text in _notebook() if kind == "code"]


def _named(name: str):
    """The module, class, function or attribute of such a dotted name. Raises AttributeError."""
    try:
        return pkgutil.resolve_name(name)
    except AttributeError:
        pytest.importorskip("lm_eval", reason=f"{name} may need it")
        raise


@pytest.mark.parametrize("name", TEXTS)
def test_names_exist(name):
    for found in sorted(set(re.findall(r"(?<![\w./-])sled(?:\.[A-Za-z_]\w*)+", TEXTS[name]))):
        _named(found)


@pytest.mark.parametrize(("name", "code"), CODE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CODE)])
def test_examples_call_what_there_is(name, code):
    known = dict(VARIABLES)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "sled":
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            for alias in node.names:
                _named(f"{node.module}.{alias.name}")
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        first, *rest = ast.unparse(call.func).split(".")
        target = ".".join([known.get(first, first), *rest])
        if not re.fullmatch(r"sled(\.\w+)+", target):
            continue
        called = inspect.signature(_named(target))
        own = [None] if first in VARIABLES else []  # self
        if not any(isinstance(given, ast.Starred) for given in call.args) and all(of.arg for of in call.keywords):
            called.bind(*own, *call.args, **{of.arg: of.value for of in call.keywords})


COMMANDS = [*("demo generate score lens layers eval sweep train export calibrate tune plan".split()),
            *(f"bench {what}" for what in SLED["bench"].commands)]


@pytest.fixture(scope="module")
def options():
    """The options of every command, as its --help defines them: at the start of a line, unlike its explanations."""
    found = {}
    for command in COMMANDS:
        text = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
            patch.setenv("COLUMNS", "80")
            main([*command.split(), "--help"])
        assert end.value.code == 0
        defined = re.findall(r"^[│ ] (-.*?)(?:  |│|$)", text.getvalue(), re.M)
        found[command] = {option for line in defined for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", line)}
    return found


def test_commands_take_the_options_of_the_examples_and_no_other_is_named(options):
    known = set().union(*options.values(), OF_OTHERS)
    for name, text in TEXTS.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?!\w)", text)) <= known, name
        for line in re.findall(r"^\s*(sled [a-z].*)$|`(sled [a-z][^`]*)`", re.sub(r"\\\n\s*", " ", text), re.M):
            words = shlex.split("".join(line), comments=True)[1:]
            command = " ".join(words[:2] if words[0] == "bench" else words[:1])
            if command == "bench":
                continue
            assert command in options, f"{name}: sled {' '.join(words)}"
            given = {word for word in words if re.fullmatch("-[a-z]|--[a-z-]+", word)}
            assert given <= options[command], f"{name}: {given - options[command]} of sled {' '.join(words)}"


def test_the_example_of_a_family_is_the_familys_file():
    blocks = re.findall("```python\n(.*?)```", TEXTS["docs/families.md"], re.S)
    assert (ROOT / "models" / "families" / "olmo.py").read_text(encoding="utf-8") in blocks


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_examples_of_early_exits_take_models_that_were_trained_for_them():
    sources = [*TEXTS.values(), *(path.read_text(encoding="utf-8") for path in (ROOT / "sled" / "cli").glob("*.py"))]
    lines = re.findall(r"\bsled (?:generate|tune|calibrate|sweep|export|bench exits) .*", "\n".join(sources))
    named = [re.search(r"(?:-m|--model)[ =](\S+)", line) for line in lines
             if re.search("--(exits|exit-layers|drafts|draft-layers|thresholds)", line)]
    models = {match[1] for match in named if match}
    assert models and all("layerskip" in model or model == "demo" for model in models), models
