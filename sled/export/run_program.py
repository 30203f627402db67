"""Runs this exported model. Needs jax, numpy, safetensors, flatbuffers, and tokenizers for text; nothing else.

    python run.py "Question: ..." --max-new-tokens 64 --set sampling.temperature=0.8 --seed 1

    from run import Program                      # in Python, with this folder on the path
    program = Program()
    tokens, layers = program.generate([[5, 7, 9]], max_new_tokens=64)[0]

program.json lists the numbers that --set, or a dict `numbers`, may change: one for all rows, or an array
with the rows first.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.flax import load_file


class Program:
    """The programs of a folder, its weights on the default device."""

    def __init__(self, folder=Path(__file__).parent):
        self.folder = Path(folder)
        self.about = json.loads((self.folder / "program.json").read_text(encoding="utf-8"))
        self.weights = load_file(self.folder / self.about["weights"]["file"])
        self.calls = {}

    def call(self, name, *arguments):
        """A program by name, as program.json describes it; every new shape is compiled once."""
        if name not in self.calls:
            data = (self.folder / self.about["programs"][name]["file"]).read_bytes()
            self.calls[name] = jax.jit(export.deserialize(bytearray(data)).call)
        try:
            return self.calls[name](*arguments)
        except jax.errors.JaxRuntimeError as error:  # such as StableHLO that is newer than this jax
            error.add_note(f"This program was exported with jax {self.about['versions']['jax']} and is run with "
                           f"{jax.__version__}: an older jax than the exporter's may not read it.")
            raise

    def generate(self, prompts, max_new_tokens=128, seed=0, numbers=None, stop_ids=None):
        """Of each prompt (token ids): its new tokens, and the layer that said each. Row i draws from seed + i."""
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.about["max_positions"]:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; 1 to {self.about['max_positions'] - 1} fit")
            if not 0 <= min(prompt) <= max(prompt) < self.about["vocabulary"]:
                raise ValueError(f"prompt {i} has token ids outside 0 .. {self.about['vocabulary'] - 1}")
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
            try:
                value = np.asarray(changed.get(name, number["default"])).astype(number["dtype"])
            except ValueError:
                raise ValueError(f"{name} is {changed[name]!r}, but must be a number") from None
            if "most" in number and ((value < 1) | (value > number["most"])).any():
                raise ValueError(f"{name} must be from 1 to {number['most']}, its bound at export")
            made[name] = np.broadcast_to(value, ([rows] if number["rows"] else []) + number["shape"])
        return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", help="text, or with --ids token ids separated by commas")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", action="store_true", help="read and write token ids instead of text")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER")
    options = parser.parse_args()
    program = Program()
    try:
        run(program, options)
    except ValueError as error:
        parser.error(str(error))


def run(program, options):
    pairs = [entry.partition("=")[::2] for entry in options.set]
    numbers = {name: value.split(",") if "," in value else value for name, value in pairs}
    texts = [text.replace("\\n", "\n") for text in options.prompts]  # a backslash and n, as one types it in a shell
    if options.ids or program.about["tokenizer"] is None:
        prompts, show = [[int(x) for x in text.split(",")] for text in texts], str
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(program.folder / program.about["tokenizer"]))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        prompts, show = [tokenizer.encode(text).ids for text in texts], tokenizer.decode
    for prompt, (tokens, _) in zip(texts, program.generate(prompts, options.max_new_tokens, options.seed,
                                                                     numbers), strict=True):
        print(f"{prompt}{show(tokens)}")


if __name__ == "__main__":
    main()
