"""Decoding over a mesh of devices gives what one device gives; over several processes too, which end together."""

import json
import signal
import subprocess
import sys

import pytest
from programs import HERE, free_address, on_devices, run_together

COMMAND = ["-c", "import sys; from sled.cli import main; sys.exit(main(sys.argv[1:]))"]
ONE_EACH = ["llama-biases", "mistral-window", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "olmo2",
            "phi3", "mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize(("data", "tensor", "kv_heads", "ways", "families"), [
    (2, 4, 2, "early exit", []),
    *(pytest.param(*mesh, "all", [], marks=pytest.mark.exhaustive)
      for mesh in ((8, 1, 4), (1, 8, 4), (1, 8, 1), (4, 2, 2))),
    pytest.param(2, 4, 4, "all", ONE_EACH, marks=pytest.mark.exhaustive)])
def test_eight_devices_decode_as_one(data, tensor, kv_heads, ways, families, tiny_folder, tmp_path):
    run_together([(on_devices(8), ["mesh_of_decoding.py", str(data), str(tensor), str(kv_heads), tmp_path, ways,
                                   *map(tiny_folder, families)])])


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory):
    """Four layers of the bundled model with its tokenizer, in a folder."""
    return demo.save(tmp_path_factory.mktemp("two") / "model")


def start(model, prompts, index: int, address: str, *options: str, **environment: str) -> subprocess.Popen:
    """One of two processes that continue the prompts of a file."""
    return subprocess.Popen(
        [sys.executable, *COMMAND, "generate", "-m", model, "--file", prompts, "--json", "--coordinator", address,
         "--processes", "2", "--process", str(index), *options],
        env=on_devices(1, **environment), cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def prompts_file(folder, count: int):
    file = folder / f"{count}.txt"
    file.write_text("\n".join(f"Question: Ash has {n} toys and buys {n + 3} more. How many are there?\\nAnswer:"
                              for n in range(count)))
    return file


def test_two_processes_write_one_result(model, demo, tmp_path):
    file = prompts_file(tmp_path, 5)
    prompts = [line.replace("\\n", "\n") for line in file.read_text().splitlines()]
    address = free_address()
    both = [start(model, file, index, address, "-n", "12") for index in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = [json.loads(line) for line in said[0][0].splitlines()]
    assert [row["tokens"] for row in rows] == demo.generate(prompts, max_new_tokens=12).tokens
    assert said[1][0] == "" and "running on 2 x cpu in 2 processes" in said[0][1]


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_process_with_other_options_is_told_by_all(index, model, tmp_path):
    address, file = free_address(), prompts_file(tmp_path, 5)
    both = [start(model, file, each, address, "-n", "12" if each == index else "13") for each in range(2)]
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert all("--max-new-tokens is not the same in process" in words for words in said), said


@pytest.mark.parametrize("index", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_where_one_process_is_killed_the_other_ends_with_an_error(index, model, tmp_path):
    address, file = free_address(), prompts_file(tmp_path, 3000)
    both = [start(model, file, each, address, "-n", "12", TQDM_DISABLE="0") for each in range(2)]
    words = ""
    while "32/3000" not in words:
        words += both[0].stderr.read(1) or pytest.fail(words)
    both[index].send_signal(signal.SIGKILL)
    both[index].communicate()
    out, errors = both[1 - index].communicate(timeout=60)
    assert both[1 - index].returncode == 1 and out == "" and "another process of this run has ended" in errors


@pytest.mark.exhaustive
def test_what_the_first_process_finds_wrong_is_said_by_all(model, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    address, taken = free_address(), tmp_path / "a file"
    taken.touch()
    both = [subprocess.Popen(
        [sys.executable, *COMMAND, "eval", "--tasks", "sled_demo", "--limit", "2", "-m", model, "--out", taken,
         "--coordinator", address, "--processes", "2", "--process", str(each)], env=on_devices(1), cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for each in range(2)]
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert all("a file', which is a file; name a folder of your own" in words for words in said), said
