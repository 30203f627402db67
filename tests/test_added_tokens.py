"""Tokens that stand only beside `tokenizer.json`, against transformers; tokenizers that panic."""

import json
import random

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from sled.errors import TokenizerError
from sled.text.tokenizer import Tokenizer

CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=99, hidden_size=32,
              intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
LETTERS = "abcdefghijklmnopqrstuvwxyz <>|/_AB"
TEXTS = ["<s>a <x>b<y> ab <own> </s><|im_end|>", "zab <x> <y>x<pad>ab", "<AB><ab>  <x>  <own>", "plain <", "<x><x>"]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:(?!sled)")  # of transformers


def flags(content, **changed):
    """A token as these files have it."""
    rest = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return dict(rest, content=content, special=True) | changed


def write(folder, own=("<s>", "</s>"), lower=False, **files):
    """A folder with a tokenizer of single characters, `own` added to it, and these files as JSON beside it."""
    vocabulary = {text: i for i, text in enumerate([*LETTERS, "<s>", "</s>", "<unk>"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken(**token) if isinstance(token, dict) else AddedToken(token, special=True)
                          for token in own])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in {"config": CONFIG, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def same_as_transformers(folder):
    transformers = pytest.importorskip("transformers",
                                       reason="transformers is not installed: pip install sled-jax[parity]")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    return ours


NEXT = len(LETTERS) + 3  # the first id after the vocabulary
BESIDE = {
    "listed": dict(tokenizer_config={"added_tokens_decoder": {NEXT: flags("<x>"), NEXT + 1: flags("<y>")}}),
    "listed-other-flags": dict(tokenizer_config={"added_tokens_decoder": {
        NEXT - 3: flags("<s>", lstrip=True), NEXT - 2: flags("</s>", rstrip=True, special=False),
        NEXT: flags("<x>", lstrip=True, rstrip=True), NEXT + 1: flags("ab", single_word=True, special=False)}}),
    "a-map": dict(special_tokens_map={"bos_token": "<s>", "pad_token": "<pad>",
                                      "sep_token": flags("<y>", lstrip=True)}),
    "a-map-of-others": dict(special_tokens_map={"additional_special_tokens": ["<x>", "<|im_end|>"]}),
    "added": dict(added_tokens={"<x>": NEXT, "<|im_end|>": NEXT + 1, "<s>": NEXT - 3}),
    "added-and-map": dict(added_tokens={"<pad>": NEXT, "<x>": NEXT + 1}, special_tokens_map={"pad_token": "<pad>"}),
    "added-and-listed": dict(added_tokens={"<y>": NEXT},
                             tokenizer_config={"added_tokens_decoder": {NEXT: flags("<x>")}}),
    "roles": dict(tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<pad>", "image_token": "<x>"}),
    "typed-roles": dict(tokenizer_config={"eos_token": {"__type": "AddedToken", **flags("<|im_end|>", rstrip=True)}}),
    "roles-of-own-tokens": dict(own=[flags("<own>", special=False), "<s>"], tokenizer_config={"unk_token": "<own>"}),
    "others": dict(tokenizer_config={"additional_special_tokens": ["<x>", "<y>"], "bos_token": "<s>"}),
    "newer-others": dict(tokenizer_config={"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"]}),
    "named-others": dict(tokenizer_config={"extra_special_tokens": {"video_token": "<y>"}}),
    "in-the-vocabulary-alone": dict(own=(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"}),
    "split": dict(tokenizer_config={"split_special_tokens": True, "eos_token": "<|im_end|>"}),
    "normalised": dict(lower=True, own=[flags("<AB>", normalized=True)],
                       added_tokens={"<X>": NEXT + 1, "<Y>": NEXT + 2}),
    "unlisted-own": dict(own=["<own>"], tokenizer_config={"added_tokens_decoder": {NEXT + 1: flags("<x>")}}),
    "nothing": dict(tokenizer_config={"model_max_length": 8}),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast"])
def test_tokens_beside_the_tokenizer_are_those_of_transformers(name, kind, tmp_path):
    files = dict(BESIDE[name])
    if kind:
        files["tokenizer_config"] = {**files.get("tokenizer_config", {}), "tokenizer_class": kind}
    text = same_as_transformers(write(tmp_path, **files))
    if name in ("listed", "added", "others"):
        assert text.id_of("<x>") == NEXT and NEXT in text.encode("a<x>b")


NAMES = ["<x>", "<y>", "<AB>", "<s>", "</s>", "<own>", "<|im_end|>", "ab", "<pad>"]


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(12, 400))])
def test_any_mixture_of_these_files_reads_as_in_transformers(seed, tmp_path):
    r = random.Random(seed)

    def some(most):
        return r.sample(NAMES, r.randint(0, most))

    def odd(name):
        return flags(name, **{flag: r.random() < 0.4 for flag in ("lstrip", "rstrip", "normalized", "special")})

    def numbered(names):
        there = {"<s>": NEXT - 3, "</s>": NEXT - 2} | {name: NEXT + i for i, name in enumerate(own)}
        fresh = iter(range(NEXT + len(own), NEXT + 20))
        return {name: there[name] if name in there else next(fresh) for name in names}

    own = [name for name in some(2) if name not in ("<s>", "</s>")]
    config = {role: r.choice([name, {"__type": "AddedToken", **odd(name)}])
              for role, name in zip(("bos_token", "eos_token", "pad_token", "unk_token"), some(4), strict=False)}
    if r.random() < 0.5:
        config["added_tokens_decoder"] = {at: odd(name) for name, at in numbered([*own, *some(3)]).items()}
    if r.random() < 0.5:
        config["additional_special_tokens"] = some(3)
    older = {role: r.choice([name, odd(name)])
             for role, name in zip(("bos_token", "sep_token"), some(2), strict=False)}
    same_as_transformers(write(tmp_path, [odd(name) for name in own], r.random() < 0.3, tokenizer_config=config,
                               special_tokens_map=older | {"additional_special_tokens": some(2)},
                               added_tokens=numbered(some(3))))


@pytest.mark.parametrize("files, says", [
    (dict(added_tokens={"<x>": NEXT + 5}), f"token '<x>' is given the id {NEXT + 5}, but the next one .* is {NEXT}"),
    (dict(added_tokens={"<x>": 0}), f"'<x>' is given the id 0, but the next one .* is {NEXT}; write the tokenizer"),
    (dict(tokenizer_config={"added_tokens_decoder": {"2": flags("<x>")}}), "'<x>' is given the id 2"),
    (dict(tokenizer_config={"added_tokens_decoder": {"x": flags("<x>")}}), "beside tokenizer.json cannot be read"),
    (dict(tokenizer_config={"added_tokens_decoder": ["<x>"]}), "beside tokenizer.json cannot be read"),
    (dict(tokenizer_config={"added_tokens_decoder": {"40": "<x>"}}), "beside tokenizer.json cannot be read"),
    (dict(tokenizer_config={"bos_token": {"lstrip": True}}), "beside tokenizer.json cannot be read"),
    (dict(added_tokens={"<x>": "40", "<y>": 41}), "beside tokenizer.json cannot be read"),
    (dict(special_tokens_map={"additional_special_tokens": 3}), "beside tokenizer.json cannot be read"),
    (dict(added_tokens=["<x>"]), "added_tokens.json holds a list, not a JSON object"),
])
def test_tokens_that_cannot_be_added_are_refused(files, says, tmp_path):
    with pytest.raises(TokenizerError, match=says):
        Tokenizer.from_folder(write(tmp_path, **files))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x|a+)+y", "(.*a){20}$", "([a-z]+)*\\d", "(((a{1,99}){1,99}){1,99})c"])
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_pattern_that_would_never_end_is_a_named_error(pattern, part, tmp_path):
    """tokenizers gives up after ten million steps, and panics: that is no Exception."""
    whole = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    setattr(whole, part, pre_tokenizers.Split(Regex(pattern), "isolated") if part == "pre_tokenizer"
            else normalizers.Replace(Regex(pattern), "b"))
    whole.save(str(tmp_path / "tokenizer.json"))
    text = Tokenizer.from_folder(tmp_path)
    for use in (text.encode, lambda hard: text.encode_all([hard, "b"])):
        with pytest.raises(TokenizerError, match=r"fails on this input .*(retry-limit|anic)"):
            use("a" * 60 + "!")
    assert text.encode("b") == [1]


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(" * 9999}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "Nothing"}}, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, {"model": {"type": "Unigram", "vocab": [["a"]]}},
    {"added_tokens": [{"id": -1, "content": "x"}]}, {"model": None}, {"decoder": {"type": "Sequence", "decoders": [3]}},
    {"post_processor": {"type": "TemplateProcessing", "single": "x", "pair": "y", "special_tokens": {}}},
])
def test_a_damaged_tokenizer_is_named(change, tmp_path):
    write(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as a tokenizer .*; fetch"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc80b"])
def test_text_that_is_no_unicode_is_named(text, tmp_path):
    with pytest.raises(TokenizerError, match="fails on this input"):
        Tokenizer.from_folder(write(tmp_path)).encode(text)
