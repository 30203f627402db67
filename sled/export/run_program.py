"""Runs this exported model. Needs jax, numpy, safetensors, flatbuffers, and tokenizers for text; nothing else.

    python run.py "Question: ..." --max-new-tokens 64 --set sampling.temperature=0.8 --seed 1

    from run import Program                      # in Python, with this folder on the path
    program = Program()
    tokens, layers = program.generate([[5, 7, 9]], max_new_tokens=64)[0]

program.json lists the numbers that --set, or a dict `numbers`, may change: one for all rows, or an array
with the rows first.
"""

import argparse
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.flax import load_file

FORMAT = 3  # of program.json
LARGEST = 2**31 - 1
AGAIN = "copy the folder again, or export the model again"


class Program:
    """The programs of a folder, its weights on the default device. Raises ValueError for files that are not those that
    were exported, by their SHA-256 in program.json."""

    def __init__(self, folder=Path(__file__).parent):
        self.folder, self.calls = Path(folder), {}
        try:
            self.about = json.loads((self.folder / "program.json").read_text(encoding="utf-8"))
            if self.about["format"] != FORMAT:
                raise ValueError(f"it has format {self.about['format']!r}, and this run.py reads format {FORMAT}")
            named = [name for name in ("weights", "tokenizer") if self.about[name]]
            self.files = {name: self._checked(self.about[name]) for name in named}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.folder / 'program.json'} cannot be used ({error}); {AGAIN}") from None
        self.weights = load_file(self.files["weights"])

    def _checked(self, entry):
        """The path of a file that program.json names. Raises ValueError where it is not the one that was exported."""
        path = self.folder / entry["file"]
        if path.name != entry["file"] or not path.is_file():
            raise ValueError(f"it names {entry['file']!r}, which is no file of this folder")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{path} was changed or damaged: its SHA-256 is not that of the export; {AGAIN}")
        return path

    def call(self, name, *arguments):
        """A program by name, as program.json describes it; every new shape is compiled once."""
        if name not in self.calls:
            data = self._checked(self.about["programs"][name]).read_bytes()
            self.calls[name] = jax.jit(export.deserialize(bytearray(data)).call)
        try:
            return self.calls[name](*arguments)
        except jax.errors.JaxRuntimeError as error:  # such as StableHLO that is newer than this jax
            error.add_note(f"This program was exported with jax {self.about['versions']['jax']} and is run with "
                           f"{jax.__version__}: an older jax than the exporter's may not read it.")
            raise

    def generate(self, prompts, max_new_tokens=128, seed=0, numbers=None, stop_ids=None):
        """Of each prompt (token ids): its new tokens, and the layer that said each. Row i draws from seed + i.

        Raises ValueError for an argument that cannot be."""
        last = self.about["vocabulary"] - 1
        prompts = [[whole(f"a token id of prompt {i}", token, 0, last) for token in several(f"prompt {i}", prompt)]
                   for i, prompt in enumerate(several("prompts", prompts))]
        if not prompts:
            raise ValueError("no prompt was given; give a list of lists of token ids")
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.about["max_positions"]:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; 1 to {self.about['max_positions'] - 1} fit")
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 0, LARGEST)
        seed = whole("seed", seed, 0, 2**32 - len(prompts))
        if stop_ids is not None:
            stop_ids = [whole("a stop id", token, 0, last) for token in several("stop_ids", stop_ids)]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        room = min(int(lengths.max()) + max_new_tokens, self.about["max_positions"])
        tokens = np.zeros((len(prompts), -(-room // 64) * 64), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[:len(prompt)] = prompt
        stop = self.about["stop_ids"] if stop_ids is None else stop_ids
        out = self.call("generate", self.weights, self.numbers(len(prompts), numbers), {
            "tokens": tokens, "lengths": lengths, "max_new_tokens": np.full(len(prompts), max_new_tokens, np.int32),
            "seeds": seed + np.arange(len(prompts), dtype=np.uint32), "stop_ids": np.array(stop or [-1], np.int32)})
        tokens, ends, layers = (np.asarray(out[name]) for name in ("tokens", "lengths", "layers"))
        return [(tokens[i, n:end].tolist(), layers[i, n:end].tolist())
                for i, (n, end) in enumerate(zip(lengths, ends, strict=True))]

    def fuse(self, hidden, numbers=None):
        """Logits [B, V] of hidden states [B, C, D] of the layers that program.json names, as they are projected."""
        about = self.about["programs"]["fuse"]
        [line] = [line for line in about["arguments"] if line["name"] == "hidden"]
        hidden = np.asarray(hidden)
        if hidden.dtype.kind not in "fiV" or list(hidden.shape[1:]) != line["shape"][1:] or not len(hidden):
            raise ValueError(f"hidden has shape {list(hidden.shape)} and type {hidden.dtype}, but must be "
                             f"{line['shape']} of {line['dtype']}")
        hidden = hidden.astype(jax.numpy.dtype(line["dtype"]))
        if not np.isfinite(hidden.astype(np.float32)).all():
            raise ValueError("hidden has values that are not finite; a hidden state has none")
        wanted = {name: value for name, value in self.numbers(len(hidden), numbers).items()
                  if name.startswith("fusion.")}
        return self.call("fuse", self.weights[about["projection"]], wanted, hidden)["logits"]

    def numbers(self, rows, changed=None):
        """Every number in the shape that the programs take, those in `changed` in place of the defaults."""
        known, changed = self.about["numbers"], changed or {}
        if unknown := set(changed) - set(known):
            raise ValueError(f"no numbers called {sorted(unknown)}; there are {', '.join(known)}")
        made = {}
        for name, number in known.items():
            value = as_number(name, changed.get(name, number["default"]), number)
            shape = ([rows] if number["rows"] else []) + number["shape"]
            try:
                made[name] = np.broadcast_to(value, shape)
            except ValueError:
                raise ValueError(f"{name} has shape {list(value.shape)}, but must have {shape}, or less") from None
        return made


def several(name, value):
    """The entries of a list, a tuple or an array."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return list(value)
    raise ValueError(f"{name} is {value!r:.100}, but must be a list")


def whole(name, value, low, high):
    """A whole number within bounds."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r:.100}, but must be a whole number from {low} to {high}")
    return int(value)


def as_number(name, value, number):
    """A number or an array of numbers in the type that program.json gives, and within its bounds."""
    try:
        wide = np.asarray(value)
        if wide.dtype.kind not in "iufUV":
            raise ValueError
        wide = wide.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r:.100}, but must be a number") from None
    low, high = float(number.get("from", "-inf")), float(number.get("to", np.finfo(np.float32).max))
    other = number.get("or", low)  # a number that is allowed besides
    if not (((low <= wide) & (wide <= high)) | (wide == other)).all():
        besides = f"{other} or " if "or" in number else ""
        raise ValueError(f"{name} is {value!r:.100}, but must be {besides}from {low:g} to {high:g}, its bounds at "
                         "export")
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(number["dtype"])
    if number["dtype"] == "int32" and (narrow != wide).any():
        raise ValueError(f"{name} is {value!r:.100}, but must be a whole number")
    if ((narrow == 0) != (wide == 0)).any() or (np.isinf(narrow) != np.isinf(wide)).any():
        raise ValueError(f"{name} is {value!r:.100}, which is {narrow} in {number['dtype']}; give what it can hold")
    return narrow


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", help="text, or with --ids token ids separated by commas")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", action="store_true", help="read and write token ids instead of text")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER")
    options = parser.parse_args()
    try:
        run(Program(), options)
    except ValueError as error:
        parser.error(str(error))


def run(program, options):
    pairs = [entry.partition("=")[::2] for entry in options.set]
    numbers = {name: value.split(",") if "," in value else value for name, value in pairs}
    texts = [text.replace("\\n", "\n") for text in options.prompts]  # a backslash and n, as one types it in a shell
    for text in texts:
        text.encode("utf-8")  # raises ValueError for what the shell passed and is no text
    if options.ids or program.about["tokenizer"] is None:
        prompts, show = [[int(x) for x in text.split(",")] for text in texts], str
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(program.files["tokenizer"]))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        prompts, show = [tokenizer.encode(text).ids for text in texts], tokenizer.decode
    for prompt, (tokens, _) in zip(texts, program.generate(prompts, options.max_new_tokens, options.seed,
                                                                     numbers), strict=True):
        print(f"{prompt}{show(tokens)}")


if __name__ == "__main__":
    main()
