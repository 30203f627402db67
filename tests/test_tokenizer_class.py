"""Tokenizers whose class puts its own parts in the place of those of tokenizer.json, against transformers."""

import json

import pytest
import tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sled.errors import TokenizerError
from sled.text.tokenizer import Tokenizer
from sled.text.tokenizer_class import CLASSES, OTHERS

SHAPE = dict(vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
CORPUS = ["the quick brown fox jumps over the lazy dog", "In 2024 there were 12345 cats.", "x = 1\n    y", "é 日本"] * 9
TEXTS = ["hello", " hello", "  hello  ", "a  b   c", "<s>hello", "<s> the</s>  fox", "the</s>the", "\n\nx\ty", "", " ",
         "   ", "e\u0301é", "日本語 😀", "12345 678", "it's DON'T", "<|endoftext|> the", "the<|im_start|>user\nhi",
         "▁the ▁ dog", "\x00\x01", "<unk> x", "<0x41>", "x<x>y <x> z", "ok  \r\n\r\n ok", "the▁<PRE>fox"]
X = dict(content="<x>", lstrip=True, rstrip=False, normalized=False, single_word=False, special=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:(?!sled)")  # of transformers


def pieces() -> Backend:
    """As Llama's: a normaliser that puts ▁ for spaces and before the text, and bytes for what is unknown."""
    tokenizer = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    tokenizer = Backend.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def byte_level() -> Backend:
    """With a splitter of its own, as SmolLM's."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(tokenizer, family, **settings)`: a model's folder without weights."""
    specs = {"pieces": pieces().to_str(), "bytes": byte_level().to_str()}

    def write(tokenizer, family="llama", config=(), drop=(), **settings):
        to = tmp_path_factory.mktemp("tokenizer")
        spec = {name: None if name in drop else part for name, part in json.loads(specs[tokenizer]).items()}
        (to / "tokenizer.json").write_text(json.dumps(spec))
        (to / "config.json").write_text(json.dumps(SHAPE | {"model_type": family} | dict(config)))
        free = str(1 + max(spec["model"]["vocab"].values()))
        (to / "tokenizer_config.json").write_text(json.dumps(settings).replace('"next"', f'"{free}"'))
        return to

    return write


LLAMA = dict(tokenizer_class="LlamaTokenizer")
CASES = {
    "llama": ("pieces", LLAMA),
    "llama, fast": ("pieces", dict(tokenizer_class="LlamaTokenizerFast", bos_token="<s>", eos_token="</s>")),
    "llama, legacy": ("pieces", dict(LLAMA, legacy=True, add_bos_token=False, add_eos_token=True)),
    "llama, null": ("pieces", dict(LLAMA, legacy=None, add_prefix_space=None, unk_token=None)),
    "llama, no prefix": ("pieces", dict(LLAMA, add_prefix_space=False, bos_token=None)),
    "llama, tokens": ("pieces", dict(LLAMA, added_tokens_decoder={
        "0": dict(X, content="<unk>"), "1": dict(X, content="<s>", special=True), "next": X}, pad_token="<pad>")),
    "llama, no template": ("pieces", dict(LLAMA, drop=("post_processor",), sep_token="dog")),
    "llama in config.json": ("pieces", dict(config=LLAMA)),
    "llama, bytes": ("bytes", dict(LLAMA, eos_token="<|endoftext|>")),
    "llama of a mistral": ("pieces", dict(LLAMA, family="mistral")),
    "llama of a qwen3": ("pieces", dict(LLAMA, family="qwen3")),
    "llama of a qwen2": ("bytes", dict(LLAMA, family="qwen2", eos_token="<|im_end|>")),
    "code llama": ("pieces", dict(tokenizer_class="CodeLlamaTokenizer", drop=("post_processor",))),
    "code llama, other": ("pieces", dict(tokenizer_class="CodeLlamaTokenizer", bos_token="</s>", unk_token="<s>")),
    "gpt2": ("bytes", dict(tokenizer_class="GPT2Tokenizer")),
    "gpt2, prefix": ("bytes", dict(tokenizer_class="GPT2TokenizerFast", add_prefix_space=True, eos_token="<eos>")),
    "gpt2, normaliser": ("pieces", dict(tokenizer_class="GPT2Tokenizer", bos_token=None, eos_token=None)),
    "qwen2": ("bytes", dict(tokenizer_class="Qwen2Tokenizer", family="qwen2")),
    "qwen2 without a class": ("bytes", dict(family="qwen2")),
    "qwen3 without a class": ("bytes", dict(family="qwen3")),
    "qwen2, prefix": ("bytes", dict(family="qwen2", add_prefix_space=True, extra_special_tokens=["<x>"],
                                    added_tokens_decoder={"next": X})),
    "qwen3 as it stands": ("bytes", dict(family="qwen3", tokenizer_class="PreTrainedTokenizerFast")),
    "qwen3_moe without a class": ("bytes", dict(family="qwen3_moe")),
    "gemma": ("pieces", dict(family="gemma2", tokenizer_class="GemmaTokenizer", bos_token="<s>")),
    "gemma without a class": ("pieces", dict(family="gemma3_text")),
    "gpt2 without a class": ("bytes", dict(family="gpt2")),
    "gpt_oss without a class": ("bytes", dict(family="gpt_oss")),
    **{f"{name} of a {family}": (tokenizer, dict(family=family, tokenizer_class=f"{name}Tokenizer"))
       for family in ("mixtral", "olmo2", "phi3") for name, tokenizer in (("Llama", "pieces"), ("GPT2", "bytes"))},
    "as it stands": ("pieces", dict(tokenizer_class="PreTrainedTokenizerFast")),
    "unknown": ("pieces", dict(tokenizer_class="YiTokenizer")),
    "none": ("pieces", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_auto_tokenizer(case, folder):
    transformers = pytest.importorskip("transformers", minversion="5.24",
                                       reason="no transformers 5.24: pip install -U sled-jax[parity]")
    tokenizer, settings = CASES[case]
    where = folder(tokenizer, **settings)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(where), Tokenizer.from_folder(where)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    ours.write(where / "alone.json")  # for an exported program, which has no files beside it
    alone = tokenizers.Tokenizer.from_file(str(where / "alone.json"))
    assert [alone.encode(text).ids for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_the_class_matters_here(folder):
    """The cases would show a class that is passed over."""
    plain = Tokenizer.from_folder(folder("pieces"))
    for text, settings in ((" hello", LLAMA), ("<s> the</s>  fox", LLAMA), ("a", dict(LLAMA, add_prefix_space=False))):
        assert Tokenizer.from_folder(folder("pieces", **settings)).encode(text) != plain.encode(text)


@pytest.mark.parametrize("name", ["BertTokenizer", "GPTNeoXTokenizerFast", "T5Tokenizer", "CohereTokenizerFast",
                                  "XLMRobertaTokenizer", "WhisperTokenizer"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_classes_are_refused_by_name(name, family, folder):
    with pytest.raises(TokenizerError, match=f"of the class {name.removesuffix('Fast')}, which .* give token ids, or "):
        Tokenizer.from_folder(folder("pieces", family, tokenizer_class=name))
    assert Tokenizer.from_folder(folder("pieces", "mixtral", tokenizer_class=name)).encode("the")  # which has no say


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁the", -1.0]], "unk_id": 0},
                                   {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}])
def test_a_model_that_the_class_cannot_have_is_named(model, folder):
    where = folder("pieces", **LLAMA)
    spec = json.loads((where / "tokenizer.json").read_text())
    spec |= {"model": model, "added_tokens": [], "post_processor": None}
    (where / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=f"but tokenizer.json holds a {model['type']} model; correct tokenizer_cl"):
        Tokenizer.from_folder(where)


@pytest.mark.exhaustive
def test_all_classes_of_transformers_that_build_themselves_are_known(transformers):
    from transformers.models.auto import tokenization_auto as auto

    for name in {*filter(None, auto.TOKENIZER_MAPPING_NAMES.values()), "CodeLlamaTokenizer", "LlamaTokenizer"}:
        kind = auto.tokenizer_class_from_name(name)
        if kind is None or kind.__name__ in ("TokenizersBackend", "PythonBackend") or "__init__" not in vars(kind):
            continue
        name = name.removesuffix("Fast")
        assert name in CLASSES or name.removesuffix("Tokenizer") in OTHERS, name
