"""What the class that a folder names for its tokenizer puts in the place of parts of `tokenizer.json`.

transformers' AutoTokenizer builds some classes anew around the vocabulary of the file, with a normaliser, splitter and
decoder of their own, and default special tokens; so leading spaces, or text after a special token, get other ids than
by the file as it stands. Followed here for the classes of the supported families' checkpoints, as of transformers 5.24
(`AutoTokenizer.from_pretrained` and each class's `__init__`); refused for the others that do so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, processors

from sled.errors import TokenizerError
from sled.text.added_tokens import add_tokens_beside, read_if_there

# Classes of transformers that build themselves anew, and are not followed here.
OTHERS = frozenset("""
    Albert Bart Barthez Bartpho Bert BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall ByT5 CLIP CTRL
    Camembert Canine Clvp Cohere Cpm CpmAnt DPRQuestionEncoder Deberta DebertaV2 Dia Esm Esmc FSMT Flaubert Funnel
    GPTNeoX GPTNeoXJapanese Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert MBart MBart50 MPNet
    MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert ProphetNet Qwen3_5 Rag
    Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T Siglip2 Splinter T5 Tapas Udop VideoPrism Vits Wav2Vec2CTC
    Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet
""".split())

QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                 r"|\s+(?!\S)|\s+")
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


class Rebuilt(NamedTuple):
    """Parts of `tokenizer.json` by their names there. roles: special tokens where the folder names none."""

    model: dict[str, Any]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any]
    decoder: dict[str, Any]
    roles: dict[str, str]
    begins: bool = False  # texts begin with the BOS token, whatever the file says
    bare: bool = False  # tokens that are named as special have no other flag, whatever their entries say


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def _spaced(*, strip: bool) -> dict[str, Any]:
    """The decoder of SentencePiece's vocabularies."""
    parts = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else [])]
    return {"type": "Sequence", "decoders": parts}


def _llama(config: Mapping[str, Any]) -> Rebuilt:
    prefix, legacy = config.get("add_prefix_space"), config.get("legacy", False)
    prefix = prefix is None or bool(prefix)
    scheme = ("first" if not legacy else "always") if prefix else "never"
    return Rebuilt({"fuse_unk": True, "byte_fallback": True}, None, _metaspace(scheme), _spaced(strip=prefix),
                   {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _code_llama(config: Mapping[str, Any]) -> Rebuilt:
    prefix = config.get("add_prefix_space", True)
    prefix = prefix is None or bool(prefix)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "prefix_token": "▁<PRE>",
             "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>", "fill_token": "<FILL_ME>"}
    unknown = config.get("unk_token", "<unk>")
    return Rebuilt({"fuse_unk": True, "byte_fallback": True,
                    "unk_token": unknown["content"] if isinstance(unknown, dict) else str(unknown)},
                   None, _metaspace("first" if prefix else "never"), _spaced(strip=True), roles, begins=True)


def _gpt2(config: Mapping[str, Any]) -> Rebuilt:
    end = "<|endoftext|>"
    return Rebuilt({"continuing_subword_prefix": "", "end_of_word_suffix": ""}, None,
                   BYTES | {"add_prefix_space": bool(config.get("add_prefix_space", False))}, BYTES,
                   {"bos_token": end, "eos_token": end, "unk_token": end})


def _qwen2(config: Mapping[str, Any]) -> Rebuilt:
    end = "<|endoftext|>"
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    own = BYTES | {"add_prefix_space": bool(config.get("add_prefix_space", False)), "use_regex": False}
    return Rebuilt({"continuing_subword_prefix": "", "end_of_word_suffix": ""}, {"type": "NFC"},
                   {"type": "Sequence", "pretokenizers": [split, own]}, BYTES,
                   {"eos_token": end, "unk_token": end, "pad_token": end}, bare=True)


def _gemma(config: Mapping[str, Any]) -> Rebuilt:
    unknown = config.get("unk_token", "<unk>")
    return Rebuilt({"fuse_unk": True, "byte_fallback": True,
                    "unk_token": unknown["content"] if isinstance(unknown, dict) else str(unknown)},
                   {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                   {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
                   _spaced(strip=False),
                   {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
                    "mask_token": "<mask>"})


CLASSES: Mapping[str, Callable[[Mapping[str, Any]], Rebuilt]] = {
    "LlamaTokenizer": _llama, "CodeLlamaTokenizer": _code_llama, "GPT2Tokenizer": _gpt2, "Qwen2Tokenizer": _qwen2,
    "GemmaTokenizer": _gemma}
# What AutoTokenizer takes by the model's family: where the folder names no class, and where it believes none.
OF_FAMILY = {**dict.fromkeys(("qwen3", "qwen3_moe"), "Qwen2Tokenizer"), "gpt2": "GPT2Tokenizer",
             **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer")}
BELIEVES_NONE = {"mistral": "", "mixtral": "", "olmo2": "", "phi3": "", "qwen2": "Qwen2Tokenizer"}


def tokenizer_of(folder: Path, text: str) -> Tokenizer:
    """The tokenizer of a folder whose `tokenizer.json` is `text`, as its class makes it, with the tokens beside it.

    Raises TokenizerError for files that cannot be read or used; and what tokenizers raises for a damaged one.
    """
    of_class = _rebuilt(folder, text, read_if_there(folder / "tokenizer_config.json"))
    tokenizer = Tokenizer.from_str(text)
    own = tokenizer.get_added_tokens_decoder()
    if of_class is not None:
        spec = _replace(json.loads(text), of_class, folder)
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    roles, bare = ({}, False) if of_class is None else (of_class.roles, of_class.bare)
    first = add_tokens_beside(tokenizer, folder, own, roles, bare=bare)
    if of_class is not None and of_class.begins:
        begin = [] if first is None else [first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A"], pair=[*begin, "$A", *begin, "$B"],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in begin])
    return tokenizer


def _rebuilt(folder: Path, text: str, config: Mapping[str, Any]) -> Rebuilt | None:
    """What the tokenizer's class puts in the place of parts of the folder's `tokenizer.json`; None: nothing.

    config: of `tokenizer_config.json`. Raises TokenizerError for a class that is not followed.
    """
    name = _class_of(folder, text, config)
    if name.removesuffix("Tokenizer") in OTHERS:
        raise TokenizerError(
            f"{folder}: its tokenizer is of the class {name}, which in transformers does not use tokenizer.json as it "
            "stands, and which is not followed here, so that ids would differ; give token ids, or set tokenizer_class "
            "to PreTrainedTokenizerFast in tokenizer_config.json to use the file as it stands")
    return CLASSES[name](config) if name in CLASSES else None


def _replace(spec: dict[str, Any], of_class: Rebuilt, folder: Path) -> dict[str, Any]:
    """The content of `tokenizer.json` with the parts of the class, and without added tokens: they are added anew."""
    model = spec.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise TokenizerError(f"{folder}: its tokenizer is of a class made of byte pairs, but tokenizer.json holds a "
                             f"{model.get('type')} model; correct tokenizer_class in tokenizer_config.json")
    plain = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return spec | {"added_tokens": [], "normalizer": of_class.normalizer, "pre_tokenizer": of_class.pre_tokenizer,
                   "decoder": of_class.decoder,
                   "model": plain | of_class.model | {"vocab": model["vocab"], "merges": model["merges"]}}


def _class_of(folder: Path, text: str, config: Mapping[str, Any]) -> str:
    """The class that AutoTokenizer takes, without "Fast"; "" where it uses the file as it stands."""
    model = read_if_there(folder / "config.json")
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    named = named.removesuffix("Fast") if isinstance(named, str) else ""
    family = "" if "auto_map" in config else model.get("model_type")
    if family in BELIEVES_NONE:
        return BELIEVES_NONE[family]
    if named == "LlamaTokenizer" and "auto_map" not in config and '"ByteLevel"' in text:
        return ""
    return named or OF_FAMILY.get(family, "")
