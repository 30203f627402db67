"""The model that a run starts from: one that exists, or one whose weights begin at random; and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, trainers

from sled.errors import CheckpointError, SettingError
from sled.io import write_json
from sled.models import Decoder, DecoderConfig, load_folder, read_config
from sled.models.config import ExitHeads
from sled.models.families.registry import HEADS_CONFIG, format_config, write_heads
from sled.models.hub import folder_of
from sled.models.huggingface import TOKENIZER_FILES, copy_files
from sled.models.layers import Block
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.sharding import Sharding
from sled.models.stored import abstract_stacked
from sled.settings.decorator import setting, settings
from sled.settings.describe import describe
from sled.settings.rules import Flag, OrNone, Whole
from sled.text.tokenizer import Tokenizer
from sled.train.data.sources import Source
from sled.train.objective.exit_heads import with_heads
from sled.train.parallel.distributed import synchronise
from sled.train.recipes import CONTEXT

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_EXAMPLES = 20_000  # that a new tokenizer is made from, at most


@settings
class NewModel:
    """A Llama-shaped model whose weights begin at random."""

    layers: int = setting(Whole(2, hint="early layers are to speak, so there must be some"), default=8,
                          help="decoder layers")
    width: int = setting(Whole(2, hint="the heads share it"), default=128,
                         help="width of the hidden states")
    heads: int = setting(Whole(1, hint="they share the width"), default=4, help="query heads")
    kv_heads: int | None = setting(OrNone(Whole(1, hint="they divide the query heads"), "as many as heads"),
                                   default=None, help="key/value heads")
    mlp_width: int | None = setting(OrNone(Whole(1, hint="2.75 to 4 times the width is usual"), "2.75 times the width"),
                                    default=None, help="width of the feed-forward layers")
    positions: int | None = setting(OrNone(Whole(2, hint="no text can be longer"), "as many as a row of training has"),
                                    default=None, help="tokens of the longest text that it is made for")
    vocabulary: int = setting(Whole(257, hint="256 are the bytes, and one ends a text"), default=1000,
                              help="tokens of a byte-level BPE made from the data")
    tokenizer: Path | None = setting(default=None, help="folder whose tokenizer.json is taken instead")
    end_of_text: str = setting(default=END_OF_TEXT, help="its token that ends a text")
    tied_head: bool = setting(Flag(hint="True shares one matrix"), default=True,
                              help="whether the embedding table is the projection too")

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise SettingError(f"NewModel.width is {self.width}, which {self.heads} heads cannot share evenly (each "
                               "takes an even number of channels); choose another number of heads")

    def config(self, vocabulary: int, end_id: int, positions: int) -> DecoderConfig:
        return DecoderConfig(
            "llama", vocab_size=vocabulary, width=self.width, mlp_width=self.mlp_width or self.width * 11 // 4,
            num_layers=self.layers, num_heads=self.heads, num_kv_heads=self.kv_heads or self.heads,
            head_dim=self.width // self.heads, max_positions=positions, tied_head=self.tied_head, eos_ids=(end_id,),
            pad_id=end_id)


class InitialModel(NamedTuple):
    """A run's model before its weights are read or made.

    folder: of the weights, None where they begin at random. context: tokens of a row. origin: what the weights come
    from, as JSON has it, for a resumed run to compare (`sled.train.run.resume`).
    """

    config: DecoderConfig
    text: Tokenizer
    folder: Path | None
    context: int
    origin: Any

    def decoder(self, seed: int, sharding: Sharding | None) -> Decoder:
        """The model in the stacked form, float32, on the mesh where there is one; random weights do not depend on it.
        """
        config, folder = self.config, self.folder
        heads = config.exit_heads
        if heads is not None and (folder is None or read_config(folder).exit_heads is None):  # they are new
            bare = self._replace(config=dataclasses.replace(config, exit_heads=None))
            return with_heads(bare.decoder(seed, sharding), heads, mesh=sharding and sharding.mesh, seed=seed)
        if folder is None:
            graph, _ = nnx.split(abstract_stacked(config))
            make = functools.partial(_random_weights, config)
            key = jax.random.key(seed)
            return nnx.merge(graph, jax.jit(make)(key) if sharding is None else sharding.create(make, key))
        if sharding is None:
            decoder = load_folder(folder, dtype="float32").stack()
        else:
            decoder = load_onto(folder, sharding.mesh, dtype="float32")
        return decoder.for_long_context() if config.long_context else decoder


def prepare_initial_model(model: str | Path | NewModel, source: Source, context: int | None, folder: Path, *,
                          heads: ExitHeads | None = None, long_context: bool = False, resumed: bool,
                          writes: bool = True) -> InitialModel:
    """Puts config.json and the tokenizer of a run's model into the empty `folder`; all processes call this together.

    model: what to start from: "demo", a Hugging Face folder or a hub id; or a new one.
    context: the most tokens of a row, None for as many as the model holds, at most `CONTEXT`.
    heads: new ones for its early exits.
    long_context: as for `sled.load`, of a model that exists.
    resumed: whether the run has checkpoints, so that `folder` has its files already and keeps them.
    writes: whether this process writes, of those that see the folder one.
    Raises SettingError where an existing model's context is shorter or it has exit heads already, and CheckpointError
    for a resumed run without its config.json.
    """
    if resumed and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} lacks config.json, which the run of these checkpoints wrote; restore it, or "
                              "start anew in another folder")
    new, name = isinstance(model, NewModel), str(model)
    if new:
        if long_context:
            raise SettingError("long_context is True, but a new model computes all positions in one way; leave it out")
        most = model.positions
        if most is not None and most < (context or 0):
            raise SettingError(f"NewModel.positions is {most}, but rows of training have {context} tokens; give that "
                               "or more, or a shorter context")
    else:
        model = folder_of(model)
        config = read_config(model)
        config = config.for_long_context() if long_context else config
        most = config.context
        if context is not None and context > most:
            raise SettingError(f"context is {context}, but the model in {model} was made for {most} positions; give "
                               "that or less" + (config.beyond and f" ({config.beyond})"))
        if heads is not None and config.exit_heads is not None:
            raise SettingError(f"new exit heads are given, but the model in {model} has some already, after layers "
                               f"{', '.join(map(str, config.exit_heads.layers))}; leave yours out to go on with them")
        config = config if heads is None else dataclasses.replace(config, exit_heads=heads)
    context = min(CONTEXT, most or CONTEXT) if context is None else context
    if not resumed and writes:
        if new:
            _write_new(model, source, model.positions or context, folder)
        else:
            copy_files(model, folder, (*TOKENIZER_FILES, "config.json", "generation_config.json", HEADS_CONFIG))
        if heads is not None:
            write_heads(heads, folder)
            read_config(folder)  # raises where the model has no such layers
    synchronise("the model's configuration is written")
    if new:
        return InitialModel(read_config(folder), Tokenizer.from_folder(folder), None, context,
                            dict(describe(dataclasses.replace(model, tokenizer=None)), name="new"))
    return InitialModel(config, Tokenizer.from_folder(model), model, context,
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


def _write_new(model: NewModel, source: Source, positions: int, folder: Path) -> None:
    if model.tokenizer is None:
        tokenizer = train_tokenizer(_texts(source), model.vocabulary)
        write_tokenizer(tokenizer, folder, positions)
        end, size = tokenizer.token_to_id(END_OF_TEXT), tokenizer.get_vocab_size()
    else:
        text = Tokenizer.from_folder(Path(model.tokenizer))
        end, size = text.id_of(model.end_of_text), text.vocabulary
        if end is None:
            raise SettingError(f"the tokenizer in {model.tokenizer} has no token {model.end_of_text!r}; name the one "
                               "that ends its texts as end_of_text")
        copy_files(Path(model.tokenizer), folder, TOKENIZER_FILES)
    write_json(folder / "config.json", format_config(model.config(size, end, positions), "float32"))


def _texts(source: Source):
    for example in itertools.islice(source.open(), TOKENIZER_EXAMPLES):
        if not isinstance(example.body, str):
            raise SettingError("the source holds token ids or conversations, from which no tokenizer can be made; give "
                               "NewModel.tokenizer, the folder of one")
        yield example.prompt + example.body


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens: all 256 bytes, each digit on its own; `END_OF_TEXT` is token 0."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        "model_max_length": max_length, "clean_up_tokenization_spaces": False})


def _random_weights(config: DecoderConfig, key) -> nnx.State:
    """Those of a stacked decoder. One layer is traced, not L: compiling 10 would take longer than the first step."""
    of_layers, of_rest = jax.random.split(key)
    one = dataclasses.replace(config, num_layers=1, windows=())
    weights = nnx.to_flat_state(nnx.state(Decoder.init(one, rngs=nnx.Rngs(of_rest)).stack(), nnx.Param))
    layers = jax.vmap(lambda key: nnx.state(Block(config, dtype="float32", rngs=nnx.Rngs(key)), nnx.Param))(
        jax.random.split(of_layers, config.num_layers))
    rest = [(path, leaf) for path, leaf in weights if path[0] != "layers"]
    return nnx.from_flat_state([*rest, *((("layers", *path), leaf) for path, leaf in nnx.to_flat_state(layers))])
