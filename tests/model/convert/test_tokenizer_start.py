"""Plain text begins in exported tokenizers as it did in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from model.convert.gguf_tokenizer import read_tokenizer
from model.convert.tokenizer_start import begins_with_bos, with_bos
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe

TEXTS = ("What is 12?", " a", "<｜begin▁of▁sentence｜>", "naïve 汉")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_trained(train_bpe(["What is the larger of 12 and 34?"] * 20, 320), tmp_path / "given")
    return tmp_path / "given"


def without_bos(folder: Path) -> None:
    """As GPT-2's: eos stands for bos."""
    path = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("bos_token", "add_bos_token")}
    path.write_text(json.dumps(settings | {"chat_template": settings["chat_template"].replace("{{ bos_token }}", "")}))
    special = folder / "special_tokens_map.json"
    special.write_text(json.dumps({k: v for k, v in json.loads(special.read_text()).items() if k != "bos_token"}))


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "eos for bos"])
def test_transformers_begins_plain_text_as_documents_of_pretraining_do(folder, tmp_path, bos):
    if not bos:
        without_bos(folder)
    assert not begins_with_bos(folder)
    ours, out = load_tokenizer(folder), with_bos(folder, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    assert begins_with_bos(out)
    for text in TEXTS:
        written = text if text != TEXTS[2] else "<| |>"  # control tokens in text are transformers' to read as such
        assert theirs(written)["input_ids"] == ours.encode_document(written)[:-1]
        assert load_tokenizer(out).encode(text) == ours.encode(text)
    asked = [{"role": "user", "content": "What is 12?"}]
    found = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == ours.encode_prompt("What is 12?") == load_tokenizer(out).encode_prompt("What is 12?")
    gguf = read_tokenizer(out, 320)
    assert gguf.add_bos and gguf.special["bos"] == ours.bos_id
    assert not read_tokenizer(folder, 320).add_bos


def test_what_a_tokenizer_says_itself_is_read(folder, tmp_path):
    """`add_bos_token` where it stands, else what its post-processor does."""
    out = with_bos(folder, tmp_path / "out")
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"add_bos_token": False}))
    assert not begins_with_bos(out)
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "add_bos_token"}))
    assert begins_with_bos(out)
