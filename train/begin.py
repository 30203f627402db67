"""What a run begins with: a model that exists, or one whose weights begin at random, and its tokenizer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from sled.checks import Whole, settle
from sled.errors import SettingError
from sled.models import Decoder, DecoderConfig, load_folder, read_config
from sled.models.checkpoint import TOKENIZER_FILES
from sled.models.registry import format_config
from sled.text import Text
from sled.train.folders import load_onto
from sled.train.placing import Placing
from sled.train.sources import Source
from sled.train.tokenizer import END_OF_TEXT, train_tokenizer, write_tokenizer

TOKENIZER_EXAMPLES = 20_000  # that a new tokenizer is made from, at most


@dataclasses.dataclass(frozen=True)
class NewModel:
    """A Llama-shaped model whose weights begin at random.

    layers, width: L and D. heads: query heads, each width / heads wide; kv_heads: None for as many. mlp_width: None
    for 2.75 times the width.
    tokenizer: a folder with tokenizer.json, whose token for the end of text is `end_of_text`; None makes a byte-level
        BPE of `vocabulary` tokens from the data. tied_head: whether the embedding table is the projection too.

    Raises SettingError for a value out of range.
    """

    layers: int = 8
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp_width: int | None = None
    vocabulary: int = 1000
    tokenizer: Path | None = None
    end_of_text: str = END_OF_TEXT
    tied_head: bool = True

    def __post_init__(self):
        settle(self, layers=Whole(2, hint="early layers are to speak, so there must be some"),
               width=Whole(2, hint="it is the width of the hidden states"),
               heads=Whole(1, hint="they share the width"),
               vocabulary=Whole(257, hint="256 are the bytes, and one ends a text"))
        for field, hint in (("kv_heads", "None is as many as heads"), ("mlp_width", "None is 2.75 times the width")):
            if getattr(self, field) is not None:
                settle(self, **{field: Whole(1, hint=hint)})
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise SettingError(f"NewModel.width is {self.width}, which {self.heads} heads cannot share evenly (each "
                               "takes an even number of channels); choose another number of heads")

    def config(self, vocabulary: int, end_id: int, context: int) -> DecoderConfig:
        return DecoderConfig(
            "llama", vocab_size=vocabulary, width=self.width, mlp_width=self.mlp_width or self.width * 11 // 4,
            num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.kv_heads or self.heads,
            head_dim=self.width // self.heads, max_positions=context, tied_head=self.tied_head, eos_ids=(end_id,),
            pad_id=end_id)


class Beginning(NamedTuple):
    """A run's model before its weights are read or made. folder: of the weights, None where they begin at random."""

    config: DecoderConfig
    text: Text
    folder: Path | None


def write_form(model: Path | NewModel, source: Source, context: int, form: Path) -> Beginning:
    """Puts config.json and the tokenizer of a run's model into the folder `form`, or finds them there.

    context: the most tokens of a row. Raises SettingError where an existing model's context is shorter.
    """
    if isinstance(model, NewModel):
        if not (form / "config.json").is_file():
            _new_form(model, source, context, form)
        return Beginning(read_config(form), Text.from_folder(form), None)
    config = read_config(model)
    if context > config.max_positions:
        raise SettingError(f"context is {context}, but {model} was made for {config.max_positions} positions; "
                           "give a smaller one")
    form.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, form / name)
    return Beginning(config, Text.from_folder(form), model)


def _new_form(model: NewModel, source: Source, context: int, form: Path) -> None:
    form.mkdir(parents=True, exist_ok=True)
    if model.tokenizer is None:
        tokenizer = train_tokenizer(_texts(source), model.vocabulary)
        write_tokenizer(tokenizer, form, context)
        end, size = tokenizer.token_to_id(END_OF_TEXT), tokenizer.get_vocab_size()
    else:
        text = Text.from_folder(Path(model.tokenizer))
        end, size = text.id_of(model.end_of_text), text.vocabulary
        if end is None:
            raise SettingError(f"the tokenizer in {model.tokenizer} has no token {model.end_of_text!r}; name the one "
                               "that ends its texts as end_of_text")
        for name in TOKENIZER_FILES:
            if (Path(model.tokenizer) / name).is_file():
                shutil.copyfile(Path(model.tokenizer) / name, form / name)
    # Last: with it the folder counts as whole.
    written = json.dumps(format_config(model.config(size, end, context), "float32"), indent=2)
    (form / "config.json.unfinished").write_text(written + "\n")
    (form / "config.json.unfinished").replace(form / "config.json")


def _texts(source: Source):
    for example in itertools.islice(source.open(), TOKENIZER_EXAMPLES):
        if not isinstance(example.body, str):
            raise SettingError("the source holds token ids, from which no tokenizer can be made; give "
                               "NewModel.tokenizer, the folder of theirs")
        yield example.prompt + example.body


def first_decoder(beginning: Beginning, seed: int, placing: Placing | None) -> Decoder:
    """The model in the stacked form, float32, on the mesh where there is one."""
    if beginning.folder is None:
        make = lambda: nnx.state(Decoder.init(beginning.config, rngs=nnx.Rngs(seed)).stack())  # noqa: E731
        graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder.init(beginning.config, rngs=nnx.Rngs(seed)).stack()))
        return nnx.merge(graph, jax.jit(make)() if placing is None else placing.create(make))
    if placing is None:
        return load_folder(beginning.folder, dtype="float32").stack()
    return load_onto(beginning.folder, placing.mesh, dtype="float32")
