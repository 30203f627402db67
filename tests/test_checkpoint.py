"""Folders in and out: what is written reads back the same, here and in transformers."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from sled.errors import CheckpointError, SettingError
from sled.models import Decoder, huggingface, load_folder, read_config, save_folder, save_orbax

EMBED, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"


def stored(folder) -> dict:
    """Every tensor in a folder's safetensors."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def same(a: dict, b: dict):
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), a, b)


def test_every_variant_is_written_back_as_it_was_read(variant, tiny_folder, tmp_path):
    decoder = load_folder(tiny_folder(variant))
    folder = save_folder(decoder, tmp_path / "saved")
    same(stored(folder), stored(tiny_folder(variant)))
    assert load_folder(folder).config == decoder.config
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["llama-llama3-old-spelling", "mistral-window", "qwen2-layer-types",
                                  "qwen2-tied-upper-layers-slide", "qwen3-mha-biases-windows"])
def test_transformers_reads_the_written_folder_alike(name, tiny_folder, tmp_path, transformers):
    import torch

    read = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.arange(20)[None]
    theirs = read(tiny_folder(name))
    ours = read(save_folder(load_folder(tiny_folder(name)), tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    same(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    assert load_folder(tmp_path / "theirs").config == load_folder(tmp_path / "ours").config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_survives(dtype, tiny_folder, tmp_path):
    decoder = load_folder(tiny_folder("llama"), dtype=dtype)
    assert {leaf.dtype.name for leaf in nnx.state(decoder).flat_state().leaves} == {dtype}
    half = save_folder(decoder, tmp_path / "half")
    written = save_folder(load_folder(tiny_folder("llama")), tmp_path / "written", dtype=dtype)
    same(stored(half), stored(written))
    same(stored(half), stored(save_folder(load_folder(half), tmp_path / "again")))
    config = json.loads((half / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    wide = load_folder(half, dtype=jnp.float32)
    assert wide.embedding.weight.dtype == jnp.float32
    np.testing.assert_array_equal(wide.embedding.weight[...],
                                  decoder.embedding.weight[...].astype(jnp.float32))


def test_shards_hold_what_one_file_holds(tiny_folder, tmp_path):
    decoder = load_folder(tiny_folder("qwen3"))
    folder = save_folder(decoder, tmp_path / "sharded", max_shard_bytes=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        assert file.stat().st_size < 20_000 + 4_000  # the header besides
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    whole = stored(tiny_folder("qwen3"))
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    same(stored(folder), whole)
    same(stored(save_folder(load_folder(folder), tmp_path / "one")), whole)


@pytest.mark.parametrize("name, change, form", [
    ("llama-biases", lambda w: None, Decoder.stack),
    ("llama-mha-tied", lambda w: w.update({"lm_head.weight": w[EMBED].copy()}), lambda decoder: decoder),
    ("llama", lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}),
     lambda decoder: decoder),
], ids=["stacked", "tied-with-a-head", "rotary-buffers"])
def test_other_layouts_are_written_as_the_usual_one(name, change, form, tiny_folder, tmp_path, write_model):
    weights = stored(tiny_folder(name))
    change(weights)
    decoder = load_folder(write_model(tmp_path / "in", name, weights))
    same(stored(save_folder(form(decoder), tmp_path / "out")), stored(tiny_folder(name)))


def test_token_ids_are_written_for_both_readers(tiny_folder, tmp_path, write_model):
    folder = save_folder(load_folder(write_model(tmp_path / "in", "llama", eos_token_id=[4, 5])),
                         tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [4, 5], None)


def test_tokenizer_files_come_along(tiny_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "secrets.env").write_text("")
    folder = save_folder(load_folder(tiny_folder("llama")), tmp_path / "model", tokenizer_from=source)
    assert (folder / "tokenizer.json").read_text() == "{}" and not (folder / "secrets.env").exists()
    template, extra = folder / "chat_template.jinja", folder / "additional_chat_templates" / "tool.jinja"
    extra.parent.mkdir()
    for own in (template, extra):
        own.write_text("")
    save_folder(load_folder(folder), folder, tokenizer_from=folder)
    save_folder(load_folder(folder), folder)  # with no tokenizer to replace it by
    assert (folder / "tokenizer.json").read_text() == "{}" and template.exists() and extra.exists()
    save_folder(load_folder(folder), folder, tokenizer_from=source)  # which has none of them
    assert (folder / "tokenizer.json").read_text() == "{}" and not template.exists() and not extra.exists()


@pytest.mark.parametrize("killed", [False, True], ids=["raised", "killed"])
@pytest.mark.parametrize("earlier, shards", [(None, None), (None, 20_000), (20_000, None), (10**9, 20_000)],
                         ids=["new", "new-sharded", "sharded-to-one", "one-to-sharded"])
def test_a_save_stopped_at_any_move_is_made_good_by_the_next(killed, earlier, shards, tiny_folder, tmp_path,
                                                             monkeypatch):
    """Stopped after each number of moves and removals, with what it wrote so far cleared away or, as by a kill, not."""
    decoder, source = load_folder(tiny_folder("llama")), tmp_path / "source"
    source.mkdir()
    (source / "added_tokens.json").write_text("{}")  # sorts before all weights
    how = dict(max_shard_bytes=shards or 10**9, tokenizer_from=source)
    clean = save_folder(decoder, tmp_path / "clean", **how)

    for steps in range(100):
        folder = tmp_path / f"stopped-{steps}"
        if earlier:
            save_folder(load_folder(tiny_folder("qwen3")), folder, max_shard_bytes=earlier, tokenizer_from=source)
            (folder / "notes.txt").write_text("mine")
        left = iter([True] * steps)

        def counted(real, left=left):
            def step(path, *args, **kwargs):
                if not next(left, False):
                    raise KeyboardInterrupt
                return real(path, *args, **kwargs)
            return step

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            if killed:
                patch.setattr(tempfile.TemporaryDirectory, "__exit__", lambda self, *_: not self._finalizer.detach())
            try:
                save_folder(decoder, folder, **how)
                break
            except KeyboardInterrupt:
                pass
        if not steps:  # all is written, and nothing moved
            same(stored(folder), stored(tiny_folder("qwen3")) if earlier else {})
            assert not earlier or load_folder(folder).config.family == "qwen3"
        else:
            with pytest.raises(CheckpointError, match=r"config\.json"):
                load_folder(folder)
        save_folder(decoder, folder, **how)
        same(stored(folder), stored(clean))
        assert load_folder(folder).config == decoder.config
        assert {f.name for f in folder.iterdir()} - {"notes.txt"} == {f.name for f in clean.iterdir()}
        assert (folder / "notes.txt").exists() == bool(earlier)
    assert steps > 4


@pytest.mark.parametrize("prepare, says", [
    (lambda folder: (folder.mkdir(), (folder / "thesis.txt").write_text("")),
     "no model folder that sled wrote .*thesis.txt"),
    (lambda folder: (folder.mkdir(), save_file({"a": np.ones(1)}, folder / "model.safetensors")), "that sled wrote"),
    *((lambda folder, config=config: (folder.mkdir(), (folder / "config.json").write_text(config)), "that sled wrote")
      for config in ("{", '{"model_type": "llama"}', '{"_written_by": "sled", "transformers_version": "5.1"}')),
    (lambda folder: folder.write_text(""), "is a file; give the name of a folder"),
])
def test_nothing_else_is_overwritten(prepare, says, tiny_folder, tmp_path):
    prepare(tmp_path / "taken")
    with pytest.raises(CheckpointError, match=says):
        save_folder(load_folder(tiny_folder("llama")), tmp_path / "taken")


def test_of_two_saves_at_once_one_is_refused_by_name(tiny_folder, tmp_path, monkeypatch):
    """The folder then holds the other one whole."""
    decoder, refused = load_folder(tiny_folder("llama")), []

    def second(real, folder, *rest):
        with pytest.raises(CheckpointError, match=r"another save into .* is going on"):
            save_folder(decoder, tmp_path / "model")
        refused.append(folder)
        return real(folder, *rest)

    monkeypatch.setattr(huggingface, "write_form", functools.partial(second, huggingface.write_form))
    save_folder(decoder, tmp_path / "model")
    assert refused
    same(stored(tmp_path / "model"), stored(tiny_folder("llama")))


@pytest.mark.parametrize("save", [save_folder, save_orbax])
@pytest.mark.parametrize("place", ["/proc/none", "/proc/none/model", "file/model", "file/a/model"])
def test_a_place_where_no_folder_can_be_is_named(place, save, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"(none|model) cannot be written \(.*; name a folder"):
        save(load_folder(tiny_folder("llama")), tmp_path / place)


def test_what_cannot_be_saved_is_refused_before_anything_is_replaced(tiny_folder, tmp_path):
    decoder = load_folder(tiny_folder("llama"))
    folder = save_folder(decoder, tmp_path / "model")
    broken = Decoder(decoder.config, embed=decoder.embedding, positions=None, layers=decoder.layers,
                     norm=nnx.clone(decoder.norm), head=decoder.head)
    broken.norm.weight[...] = broken.norm.weight[...].at[0].set(jnp.nan)
    with pytest.raises(CheckpointError,
                       match=r"the model: model\.norm\.weight holds values that are not finite"):
        save_folder(broken, folder)
    broken.norm.weight[...] = jnp.full_like(broken.norm.weight[...], 1e6)
    with pytest.raises(CheckpointError, match=r"values up to 1e\+06, too large for float16; use bfloat16"):
        save_folder(broken, folder, dtype="float16")
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder; give one that holds tok"):
        save_folder(decoder, folder, tokenizer_from=tmp_path / "nowhere")
    with pytest.raises(SettingError, match="max_shard_bytes is 0"):
        save_folder(decoder, folder, max_shard_bytes=0)
    same(stored(folder), stored(tiny_folder("llama")))


# What is wrong with a folder: how to break a good one, and what the error says.

def sharded(folder):
    """The folder, written anew."""
    decoder = load_folder(folder)
    shutil.rmtree(folder)
    return save_folder(decoder, folder, max_shard_bytes=20_000)


def break_index(change):
    return lambda folder: change(sharded(folder))


def put(name, value):
    """The tensor becomes `value` of what it is, or goes where that is None."""
    def prepare(folder):
        weights = load_file(folder / "model.safetensors")
        old = weights.pop(name, None)
        save_file(weights | ({name: value(old)} if value else {}), folder / "model.safetensors")
    return prepare


def first_not_finite(bad):
    return lambda array: np.concatenate([[bad], array.ravel()[1:]]).astype(array.dtype).reshape(array.shape)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_config(**fields):
    def prepare(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return prepare


@pytest.mark.parametrize("name, prepare, says", [
    ("llama", put(NORM, None), f"lacks 1 of 30 tensors: {NORM}; .* fetch them again"),
    ("llama", other_config(num_hidden_layers=5),
     r"lacks 18 of 48 tensors: .*, .*, .* and 15 more; config\.json asks for 5 layers, but 3 are stored"),
    ("llama", other_config(num_hidden_layers=2),
     r"holds 9 tensors .* not account for: model\.layers\.2\..* and 6 more"),
    ("llama", other_config(intermediate_size=41), r"has shape \(32, 40\), but .* asks for \(32, 41\); use"),
    ("llama", put(NORM, lambda a: a.astype(np.int8)), "is stored as I8, but only F32, BF16, F16, F64 are read"),
    ("llama", put(NORM, first_not_finite(np.nan)),
     f"{NORM} holds values that are not finite; .*fetch it again"),
    ("llama", put(EMBED, first_not_finite(np.inf)), f"{EMBED} holds values that are not finite"),
    ("llama", truncate, "model.safetensors is damaged or cut short .*; fetch it again"),
    ("llama", lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "is damaged or cut short"),
    ("llama", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
     "holds only PyTorch pickles, .* not loaded; convert it"),
    ("llama", lambda folder: (folder / "model.safetensors").unlink(),
     "has no model.safetensors and no .*; give"),
    ("llama", lambda folder: (folder / "config.json").unlink(), "has no config.json, so it is no model's folder; give"),
    ("llama", lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "an adapter .* merge it"),
    ("llama", break_index(lambda folder: next(folder.glob("model-00002*")).unlink()),
     "names the shard 'model-00002-of-.*', which is not in the folder; fetch it again"),
    ("llama", break_index(lambda folder: (folder / "model.safetensors.index.json").write_text("{}")),
     "index.json is damaged .*; fetch it again"),
    ("llama", break_index(lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../elsewhere/model.safetensors"}}')), "names the shard '../elsewhere"),
    ("llama-mha-tied", put("lm_head.weight", lambda _: np.ones((48, 32), np.float32)),
     f"lm_head.weight differs from {EMBED}, but config.json ties them; set tie_word_embeddings"),
    ("llama-mha-tied", other_config(tie_word_embeddings=False), "lacks 1 of 30 tensors: lm_head.weight"),
    ("llama", put(NORM, lambda a: a * 1e6), f"{NORM} has values up to .*, too large for float16"),
    ("llama", shutil.rmtree, r"model is not a folder; give a folder with config\.json"),
])
def test_what_is_wrong_with_a_folder_is_said(name, prepare, says, tmp_path, write_model):
    folder = write_model(tmp_path / "model", name)
    prepare(folder)
    with pytest.raises(CheckpointError, match=says) as error:
        load_folder(folder, dtype="float16")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_model_within_the_folder_given_is_named(tmp_path, write_model):
    write_model(tmp_path / "run" / "model", "llama")
    for read in (load_folder, read_config):
        with pytest.raises(CheckpointError, match=r"run has no config\.json.*; give .*model, which is one"):
            read(tmp_path / "run")
