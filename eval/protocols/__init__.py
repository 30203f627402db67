"""The evaluation protocols of SLED's and DoLa's authors, as tasks for lm-evaluation-harness.

    TaskManager(include_path=str(FOLDER), include_defaults=False)     # finds them; `sled eval` does so

A task is a YAML file here. What it asks and how an answer is judged stand in the module of its name (`factor`,
`truthfulqa`, `strategyqa`, `gsm8k`), which need no harness; `task` connects them with it. See docs/protocols.md.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
