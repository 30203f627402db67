"""What the tests of training data share, as a plugin of pytest: rows of the demo's tokenizer, and what batches hold."""

import json
from pathlib import Path

import datasets
import pytest

from sled.models.config import DecoderConfig
from sled.text.tokenizer import Tokenizer
from sled.train.data.batches import Batches
from sled.train.data.packing import Layout
from sled.train.data.rows import read_rows
from sled.train.data.sources import Source

DEMO = Path(__file__).parents[1] / "sled" / "demo" / "model"
END = 0
CONFIG = DecoderConfig("llama", vocab_size=1000, width=8, mlp_width=8, num_layers=2, num_heads=2, num_kv_heads=2,
                       head_dim=4, max_positions=256, eos_ids=(END,), pad_id=7)
LAYOUT = Layout(64)
TEXT = Tokenizer.from_folder(DEMO)
ROWS = [{"text": f"{name} buys {n} toys.", "n": n} for n, name in enumerate(["Ash", "Ben", "Cleo", "Dan"])]


def write(folder, kind):
    path = folder / f"a[1] {kind}.{kind}"  # brackets: a name is no pattern
    match kind:
        case "json":
            path.write_text(json.dumps(ROWS))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
        case "txt":
            path.write_text("\n".join(row["text"] for row in ROWS))
        case "parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
        case "arrow":
            with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
                for row in ROWS:
                    writer.write(row)
                writer.finalize()
    return path


@pytest.fixture
def load(tmp_path):
    """`load(data, layout, **columns)`: the rows of a source, kept in the test's folder `cache`."""

    def load(data, layout=LAYOUT, *, config=CONFIG, tokenizer=TEXT, **columns):
        return read_rows(Source(data, **columns), tokenizer, config, layout, cache=tmp_path / "cache", progress=False)

    return load


def documents_of(batch):
    """Tokens and weights of each document of a batch, row after row."""
    return [(tokens[segments == s].tolist(), weights[segments == s].tolist())
            for tokens, weights, segments in zip(*batch, strict=True) for s in range(1, segments.max() + 1)]


def one_epoch(rows, size=4, **options):
    return list(Batches(rows, size, epochs=1, **options))


def tokens_of(rows):
    return sorted(tokens for batch in one_epoch(rows) for tokens, _ in documents_of(batch))
