"""The harness's task, with checked rows, demonstrations from a file, and errors by name."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
from lm_eval.api.task import ConfigurableTask

from sled.errors import DataError, DownloadError, SledError
from sled.eval.protocols.primers import read_primer
from sled.eval.typed_rows import UNTYPED, fetched
from sled.io import first_line


class ProtocolTask(ConfigurableTask):
    """A task of this folder. Its YAML file has three keys of its own:

    class: this one.
    row: the function that turns a row of the data into the task's document, or raises DataError.
    primer: where the authors publish their demonstrations, for the tasks that take them from the file named as
        `primer_file` in their metadata; the results' metadata then has a record of it under `primer`.

    Raises SettingError, DataError and DownloadError on construction.
    """

    def __init__(self, config: Mapping):
        own = {key: config.get(key) for key in ("row", "primer")}
        config = {key: value for key, value in config.items() if key not in ("class", *own)}
        self._row, self._primer = own["row"], ""
        if own["primer"]:
            metadata = dict(config.get("metadata") or {})
            self._primer, metadata["primer"] = read_primer(config["task"], metadata.get("primer_file"), own["primer"])
            config["metadata"] = metadata
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """Get the data, and make documents of the splits that the task uses."""
        name = f"the data of the task {self.config.task} ({self.DATASET_PATH or self.DATASET_NAME})"
        remedy = "go online, or give the data as a local file"
        try:
            if self.DATASET_PATH in UNTYPED and self.config.custom_dataset is None:
                self.dataset = fetched(self.DATASET_PATH, **dataset_kwargs)
            else:
                super().download(dataset_kwargs)
        except SledError:
            raise
        except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as reason:
            raise DownloadError(f"{name} are not there ({first_line(reason)}); check the name, or {remedy}") from reason
        except OSError as reason:  # ConnectionError among them
            raise DownloadError(f"{name} could not be fetched ({first_line(reason)}); {remedy}") from reason
        except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as reason:
            raise DataError(f"{name} cannot be read ({first_line(reason)}); mend or replace the file") from reason
        for split in {self.config.test_split, self.config.fewshot_split} - {None}:
            if split not in self.dataset:
                raise DataError(f"{name} have no split {split!r}, but {', '.join(map(repr, self.dataset))}; give a "
                                f"file for it: data_files={{{split!r}: FILE}}")
            rows = [self._row(row, f"row {at} of the split {split!r} of {name}")
                    for at, row in enumerate(self.dataset[split], 1)]
            if not rows:
                raise DataError(f"{name} have no rows in the split {split!r}; give some")
            self.dataset[split] = datasets.Dataset.from_list(rows)

    def doc_to_text(self, doc, doc_to_text=None) -> str:
        return self._primer + super().doc_to_text(doc, doc_to_text)
