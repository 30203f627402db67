"""Demonstrations that stand before every question, from a file that the user names.

The authors' own are other people's texts, and not part of this library. They are published inside the functions
`create_demo_text` of https://github.com/voidism/DoLa; such a Python file can be named as it is: it is read, never run.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path

from sled.errors import DataError, SettingError


def read_primer(task: str, file: str | Path | None, published: Mapping[str, str]) -> tuple[str, dict]:
    """The text to put before each question, and a record of it for the results.

    file: a text, taken as it is but for the blank line that ends it, or one of DoLa's evaluation scripts (.py).
    published: where the authors' is (`at`), and the SHA-256 of the text made of it (`sha256`).
    The record holds file, sha256, and as_published: whether it is the authors' text.

    Raises SettingError where no file is named, DataError where it cannot be used.
    """
    if not file:
        raise SettingError(f"the task {task} puts its authors' demonstrations before each question, but no file of "
                           f"them was named; download {published['at']} and name it as primer_file in the task's "
                           f"metadata, or choose the task {task}_rows, which shows rows of the data instead")
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise DataError(f"the demonstrations' file {str(file)!r} of the task {task} cannot be read ({reason}); name a "
                        f"text file, or {published['at']}") from reason
    if Path(file).suffix == ".py":
        text = _of_source(text, str(file))
    if not text.strip():
        raise DataError(f"the demonstrations' file {str(file)!r} of the task {task} is empty; name one with text")
    text = text.rstrip("\n") + "\n\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text, dict(file=str(file), sha256=digest, as_published=digest == published["sha256"])


def _of_source(source: str, name: str) -> str:
    """The text that `create_demo_text` of a script of DoLa's would return, from the strings in it."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError) as reason:
        raise DataError(f"{name!r} is no Python file ({reason}); give demonstrations as text in a "
                        ".txt file") from reason
    constants = {node.targets[0].id: text for node in module.body if isinstance(node, ast.Assign)
                 and isinstance(node.targets[0], ast.Name) and (text := _string(node.value)) is not None}
    made = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "create_demo_text"]
    opening, columns = "", {"question": [], "chain": [], "answer": []}
    for node in ast.walk(made[0]) if made else ():
        match node:
            case ast.Assign(targets=[ast.Name("demo_text")], value=value) if (text := _string(value)) is not None:
                opening = text
            case ast.Call(ast.Attribute(ast.Name(column), "append"), [value]) if column in columns:
                columns[column].append(_string(value))
    questions, chains, answers = columns.values()
    if not answers or len(questions) != len(answers) or len(chains) not in (0, len(answers)) or any(
            None in column for column in columns.values()):
        raise DataError(f"{name!r} has no function create_demo_text that appends as many strings to answer as to "
                        "question, as DoLa's evaluation scripts have; give demonstrations as text in a .txt file")
    if chains:
        trigger = constants.get("ANSWER_TRIGGER", "The answer is")
        answers = [f"{chain} {trigger} {answer}." for chain, answer in zip(chains, answers, strict=True)]
    return opening + "".join(f"Q: {q}\nA: {a}\n\n" for q, a in zip(questions, answers, strict=True))


def _string(node: ast.expr) -> str | None:
    """The value of a string or of a sum of strings, None of anything else."""
    match node:
        case ast.Constant(str() as text):
            return text
        case ast.BinOp(left, ast.Add(), right) if None not in (parts := (_string(left), _string(right))):
            return "".join(parts)
    return None
