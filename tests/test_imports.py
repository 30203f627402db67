"""The order of the rooms, as CONTRIBUTING.md has it, holds over every import of the package; and rooms stay small."""

import ast
import collections
import functools
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

import sled
import sled.models

ROOT = Path(__file__).parents[1]
FOLDERS = {"sled": "sled", "models": "sled.models", "train": "sled.train", "eval": "sled.eval"}


def _module(file: Path) -> str:
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


MODULES = {_module(file): file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))}


def _room(module: str) -> str:
    """The first folder below `sled`, or the file there; `sled` itself is its __init__.py."""
    return module.split(".")[1] if "." in module else module


@functools.cache
def _edges() -> list[tuple[str, str, str]]:
    """(importing module, imported module, where) for all imports within the package: those inside functions and for
    type checkers too, and lazy ones."""
    edges = []
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            at = f"{file.relative_to(ROOT)}:{node.lineno}"
            assert not getattr(node, "level", 0), f"{at}: write the whole name of the module"
            for alias in node.names:
                name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
                while name and name not in MODULES:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    edges.append((module, name, at))
    lazy = [("sled", home) for home in sled._HOME.values()]
    lazy += [("sled.models", f"sled.models.{home}") for home in sled.models._HOMES.values()]
    return [*edges, *((module, home, f"{module}.__getattr__") for module, home in lazy)]


def _levels() -> list[list[str]]:
    """The order that CONTRIBUTING.md has in its block, from the ground up; rooms between commas stand side by side."""
    [block] = re.findall(r"^```\n(errors\b.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    return [level.replace(",", " ").split() for level in block.split("<")]


def test_what_is_installed_is_every_folder_of_the_project():
    """An installation from a wheel has the named packages alone; one in place has everything, and so hides a gap."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(module for module, file in MODULES.items() if file.name == "__init__.py")


def test_the_order_names_every_room_once():
    named = [room for level in _levels() for room in level]
    assert sorted(named) == sorted({_room(module) for module in MODULES})


def test_imports_go_downwards():
    level = {room: height for height, rooms in enumerate(_levels()) for room in rooms}
    wrong = [f"{where}: {_room(module)} imports {name}" for module, name, where in _edges()
             if _room(module) != _room(name) and level[_room(module)] <= level[_room(name)]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", [_room, str], ids=["rooms", "modules"])
def test_nothing_imports_in_a_circle(part):
    needs = collections.defaultdict(set)
    for module, name, _ in _edges():
        if part(module) != part(name):
            needs[part(module)].add(part(name))
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def test_rooms_and_files_stay_small():
    for folder in ("sled", "train", "eval"):
        assert len(list((ROOT / folder).glob("*.py"))) <= 8, folder
    lines = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > 400}
