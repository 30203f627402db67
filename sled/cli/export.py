"""`sled export`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Export:
    """A model from a training run's checkpoint, as a Hugging Face folder; the run may be unfinished, or still going.

    sled export run --to model
    """

    run_folder: tyro.conf.Positional[Path]
    """What sled train has as --out."""
    to: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write."""
    step: int | None = None
    """Of which checkpoint; the latest by default."""

    def run(self) -> None:
        from sled.train.export import export_checkpoint

        print(f"the model is in {export_checkpoint(self.run_folder, self.to, self.step)}", file=sys.stderr)
