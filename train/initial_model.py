"""What a run begins with: a model that exists, or one whose weights begin at random, and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices

from sled.errors import CheckpointError, SettingError
from sled.io import write_json
from sled.models import Decoder, DecoderConfig, load_folder, read_config
from sled.models.config import ExitHeads
from sled.models.families.registry import HEADS_CONFIG, format_config, write_heads
from sled.models.hub import folder_of
from sled.models.huggingface import TOKENIZER_FILES
from sled.models.layers import Block
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.sharding import Sharding
from sled.models.stored import abstract_stacked
from sled.settings.describe import describe
from sled.settings.rules import OrNone, Whole, settle
from sled.text.tokenizer import Text
from sled.train.data.sources import Source
from sled.train.data.tokenizer import END_OF_TEXT, train_tokenizer, write_tokenizer
from sled.train.objective.exit_heads import with_heads
from sled.train.recipes import CONTEXT

TOKENIZER_EXAMPLES = 20_000  # that a new tokenizer is made from, at most


@dataclasses.dataclass(frozen=True)
class NewModel:
    """A Llama-shaped model whose weights begin at random.

    layers, width: L and D. heads: query heads, each width / heads wide; kv_heads: None for as many. mlp_width: None
    for 2.75 times the width. positions: tokens of the longest text that it is made for; None for as many as a row of
    training has. More than that is never seen in training.
    tokenizer: a folder with tokenizer.json, whose token for the end of text is `end_of_text`; None makes a byte-level
        BPE of `vocabulary` tokens from the data. tied_head: whether the embedding table is the projection too.

    Raises SettingError for a value out of range.
    """

    layers: int = 8
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp_width: int | None = None
    positions: int | None = None
    vocabulary: int = 1000
    tokenizer: Path | None = None
    end_of_text: str = END_OF_TEXT
    tied_head: bool = True

    def __post_init__(self):
        settle(self, layers=Whole(2, hint="early layers are to speak, so there must be some"),
               width=Whole(2, hint="it is the width of the hidden states"),
               heads=Whole(1, hint="they share the width"),
               vocabulary=Whole(257, hint="256 are the bytes, and one ends a text"),
               kv_heads=OrNone(Whole(1, hint="None is as many as heads")),
               mlp_width=OrNone(Whole(1, hint="None is 2.75 times the width")),
               positions=OrNone(Whole(2, hint="None is as many as a row of training has")))
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise SettingError(f"NewModel.width is {self.width}, which {self.heads} heads cannot share evenly (each "
                               "takes an even number of channels); choose another number of heads")

    def config(self, vocabulary: int, end_id: int, positions: int) -> DecoderConfig:
        return DecoderConfig(
            "llama", vocab_size=vocabulary, width=self.width, mlp_width=self.mlp_width or self.width * 11 // 4,
            num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.kv_heads or self.heads,
            head_dim=self.width // self.heads, max_positions=positions, tied_head=self.tied_head, eos_ids=(end_id,),
            pad_id=end_id)


class Beginning(NamedTuple):
    """A run's model before its weights are read or made.

    folder: of the weights, None where they begin at random. context: tokens of a row. origin: what the weights come
    from, as JSON has it, for a resumed run to compare (`sled.train.run.resume`).
    """

    config: DecoderConfig
    text: Text
    folder: Path | None
    context: int
    origin: Any


def begin(model: str | Path | NewModel, source: Source, context: int | None, form: Path, *,
          heads: ExitHeads | None = None, begun: bool) -> Beginning:
    """Puts config.json and the tokenizer of a run's model into the empty folder `form`; all processes call this
    together.

    model: what to begin with: "demo", a Hugging Face folder or a hub id; or a new one.
    context: the most tokens of a row, None for as many as the model holds, at most `CONTEXT`.
    heads: new ones for its early exits.
    begun: whether the run has checkpoints, so that `form` is there already and stays.
    Raises SettingError where an existing model's context is shorter or it has exit heads already, and CheckpointError
    for a run without its form.
    """
    if begun and not (form / "config.json").is_file():
        raise CheckpointError(f"{form} lacks config.json, which the run of these checkpoints wrote; restore it, or "
                              "start anew in another folder")
    new, name = isinstance(model, NewModel), str(model)
    model = model if new else folder_of(model)
    config = None if new else read_config(model)
    if config is not None and context is not None and context > config.max_positions:
        raise SettingError(f"context is {context}, but the model in {model} was made for {config.max_positions} "
                           "positions; give that or less")
    if config is not None and heads is not None:
        if config.exit_heads is not None:
            raise SettingError(f"new exit heads are given, but the model in {model} has some already, after layers "
                               f"{', '.join(map(str, config.exit_heads.layers))}; leave yours out to go on with them")
        config = dataclasses.replace(config, exit_heads=heads)
    if new and model.positions is not None and model.positions < (context or 0):
        raise SettingError(f"NewModel.positions is {model.positions}, but rows of training have {context} tokens; give "
                           "that or more, or a shorter context")
    most = model.positions if new else config.max_positions
    limit = min(CONTEXT, most or CONTEXT)
    context = limit if context is None else context
    if not begun and jax.process_index() == 0:
        if new:
            _new_form(model, source, model.positions or context, form)
        else:
            _copy(model, form, (*TOKENIZER_FILES, "config.json", "generation_config.json", HEADS_CONFIG))
        if heads is not None:
            write_heads(heads, form)
            read_config(form)  # raises where the model has no such layers
    if jax.process_count() > 1:
        sync_global_devices("sled puts down the form of its model")
    if new:
        return Beginning(read_config(form), Text.from_folder(form), None, context,
                         dict(describe(dataclasses.replace(model, tokenizer=None)), name="new"))
    return Beginning(config, Text.from_folder(model), model, context,
                     dict(name=name, digest=_weights_digest(model)))


def _weights_digest(folder: Path) -> str:
    """SHA-256 of the weight files' names, sizes, and first and last MiB: enough to tell models apart, soon read."""
    total, some = hashlib.sha256(), 2**20
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            total.update(f"{path.name} {size} ".encode())
            for start in (0, max(size - some, 0)):
                file.seek(start)
                total.update(file.read(some))
    return total.hexdigest()


def _copy(source: Path, form: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, form / name)


def _new_form(model: NewModel, source: Source, positions: int, form: Path) -> None:
    if model.tokenizer is None:
        tokenizer = train_tokenizer(_texts(source), model.vocabulary)
        write_tokenizer(tokenizer, form, positions)
        end, size = tokenizer.token_to_id(END_OF_TEXT), tokenizer.get_vocab_size()
    else:
        text = Text.from_folder(Path(model.tokenizer))
        end, size = text.id_of(model.end_of_text), text.vocabulary
        if end is None:
            raise SettingError(f"the tokenizer in {model.tokenizer} has no token {model.end_of_text!r}; name the one "
                               "that ends its texts as end_of_text")
        _copy(Path(model.tokenizer), form, TOKENIZER_FILES)
    write_json(form / "config.json", format_config(model.config(size, end, positions), "float32"))


def _texts(source: Source):
    for example in itertools.islice(source.open(), TOKENIZER_EXAMPLES):
        if not isinstance(example.body, str):
            raise SettingError("the source holds token ids, from which no tokenizer can be made; give "
                               "NewModel.tokenizer, the folder of theirs")
        yield example.prompt + example.body


def first_decoder(beginning: Beginning, seed: int, sharding: Sharding | None) -> Decoder:
    """The model in the stacked form, float32, on the mesh where there is one; random weights do not depend on it."""
    config, folder = beginning.config, beginning.folder
    heads = config.exit_heads
    if heads is not None and (folder is None or read_config(folder).exit_heads is None):  # they are new
        bare = beginning._replace(config=dataclasses.replace(config, exit_heads=None))
        return with_heads(first_decoder(bare, seed, sharding), heads, mesh=sharding and sharding.mesh, seed=seed)
    if folder is None:
        graph, _ = nnx.split(abstract_stacked(config))
        make = functools.partial(_random_weights, config)
        key = jax.random.key(seed)
        return nnx.merge(graph, jax.jit(make)(key) if sharding is None else sharding.create(make, key))
    if sharding is None:
        return load_folder(folder, dtype="float32").stack()
    return load_onto(folder, sharding.mesh, dtype="float32")


def _random_weights(config: DecoderConfig, key) -> nnx.State:
    """Those of a stacked decoder. One layer is traced, not L: compiling 10 would take longer than the first step."""
    of_layers, of_rest = jax.random.split(key)
    one = dataclasses.replace(config, num_layers=1, windows=())
    weights = nnx.to_flat_state(nnx.state(Decoder.init(one, rngs=nnx.Rngs(of_rest)).stack(), nnx.Param))
    layers = jax.vmap(lambda key: nnx.state(Block(config, dtype="float32", rngs=nnx.Rngs(key)), nnx.Param))(
        jax.random.split(of_layers, config.num_layers))
    rest = [(path, leaf) for path, leaf in weights if path[0] != "layers"]
    return nnx.from_flat_state([*rest, *((("layers", *path), leaf) for path, leaf in nnx.to_flat_state(layers))])
