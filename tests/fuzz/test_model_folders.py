"""100 hostile model folders: every verb that opens one reads it, or refuses it in one message, within ten seconds."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.evaluation.made_models import save_ours, save_qwen
from tests.fuzz.driving import SECONDS, end_of, report

pytestmark = pytest.mark.slow

FOLDERS = 100
Damage = Callable[[Path, Random], None]
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 1e15, -1e300, 10**30, 0.5, "", "x", "x" * 100_000, [], [1], [None], [[]], {},
    {"a": {}}, {"type": "yarn"}, {"type": "yarn", "factor": "x"}, {"rope_type": "yarn", "factor": -1}, 1 << 20, 65536,
    2000, "silu", float("inf"), float("nan"), "\ud800", "\x00",
)  # fmt: skip
KEYS = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts num_experts_per_tok "
    "n_group topk_group norm_topk_prob routed_scaling_factor scoring_func topk_method max_position_embeddings "
    "rope_theta "
    "rope_scaling rope_parameters rms_norm_eps model_type architectures quantization_config layer_types "
    "mlp_layer_types "
    "num_nextn_predict_layers first_k_dense_replace initializer_range eos_token_id hidden_act attention_bias "
    "tie_word_embeddings num_key_value_heads head_dim auto_map torch_dtype"
).split()
TEMPLATES = (
    "{{ 'x' * 10**10 }}", "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'a'|center(10000000000) }}", "{{ ''.__class__.__mro__ }}",
    "{% set ns = namespace(a='x') %}{% for i in range(90) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "{{ '{:>1000000000}'.format(1) }}", "{{ (10**400)**400 ** 400 }}", "{{ raise_exception('no') }}", "{% if %}", "{{",
    "{% include 'x' %}", "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}" + "{# x #}" * 300_000,
    "{{" + "(" * 5000 + ")" * 5000 + "}}", "", "{{ messages[99].content }}", "{{ 1 / 0 }}", "\x00", "{{ "
    "lipsum(9**9) }}",
)  # fmt: skip


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")


def odd_key(folder: Path, random: Random) -> None:
    name = random.choice(("config.json", "config.json", "generation_config.json", "tokenizer_config.json"))
    known = list(json.loads((folder / name).read_text())) + (KEYS if name == "config.json" else ["chat_template"])
    for _ in range(random.randint(1, 3)):
        edit(folder / name, lambda values: values.update({random.choice(known): random.choice(ODD)}))


def huge_shape(folder: Path, random: Random) -> None:
    names = ("num_hidden_layers", "n_routed_experts", "hidden_size", "vocab_size", "intermediate_size")
    edit(folder / "config.json", lambda values: values.update(dict.fromkeys(random.sample(names, 2), 2000)))
    if random.random() < 0.5:
        most = {"n_routed_experts": 1 << 16, "num_hidden_layers": 2000}
        edit(folder / "config.json", lambda values: values.update(most))


def odd_template(folder: Path, random: Random) -> None:
    text = random.choice(TEMPLATES)
    if random.random() < 0.5:
        (folder / "chat_template.jinja").write_text(text)
    else:
        edit(folder / "tokenizer_config.json", lambda values: values.update(chat_template=text))


def listed_templates(folder: Path, random: Random) -> None:
    odd = random.choice(([1], [{}], [{"name": "default"}], [{"name": [], "template": 3}], [None], {"default": 1}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", lambda values: values.update(chat_template=odd))


def raw_file(folder: Path, random: Random) -> None:
    """A file that is no JSON, or JSON of another kind, or not a file."""
    names = "config generation_config tokenizer_config tokenizer special_tokens_map".split()
    path = folder / f"{random.choice(names)}.json"
    content = random.choice(
        (b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\x00", b"{}", b'{"a": NaN}', b"9" * 9000,
         b'{"model_type": "deepseek_v3"}', b'{"model_type": "llama"}', b'{"model_type": "qwen2", "vocab_size": "x"}',
         b'{"model_type": []}', b'{"attention": "mla"}', b"\xef\xbb\xbf{}")
    )  # fmt: skip
    path.unlink(missing_ok=True)
    kind = random.random()
    if kind < 0.8:
        path.write_bytes(content)
    elif kind < 0.87:
        os.mkfifo(path)
    elif kind < 0.94:
        path.mkdir()
    else:
        path.symlink_to(path.name)


def odd_tokenizer(folder: Path, random: Random) -> None:
    def change(values: dict[str, Any]) -> None:
        part = random.choice(("model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor"))
        slow = {"type": "Split", "pattern": {"Regex": "((a+)+)+$"}, "behavior": "Isolated", "invert": False}
        values[part] = random.choice((*ODD, [{"id": 10**12, "content": "x"}], slow))

    edit(folder / "tokenizer.json", change)


def odd_weights(folder: Path, random: Random) -> None:
    path = next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = random.choice([key for key in header if key != "__metadata__"])
    header[name][random.choice(("dtype", "shape", "data_offsets"))] = random.choice((*ODD, [-1, 5], [1 << 62, 1 << 62]))
    text = json.dumps(header).encode()
    forms = (
        struct.pack("<Q", len(text)) + text + content[8 + length :],
        struct.pack("<Q", 1 << 62) + content[8:],
        content[: random.randrange(len(content))],
        struct.pack("<Q", 50_000) + b"[" * 50_000,
        content + b"x",
    )
    path.write_bytes(random.choice(forms))


def odd_index(folder: Path, random: Random) -> None:
    maps = ({"a": "../../etc/passwd"}, [], {"a": 3}, {"a": "b"}, {"a": ""}, {"a": "x" * 300})
    index = {"weight_map": random.choice(maps)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(random.choice((index, index, []))))


DAMAGES: tuple[Damage, ...] = (
    odd_key, odd_key, odd_key, odd_key, huge_shape, odd_template, odd_template, listed_templates, raw_file, raw_file,
    odd_tokenizer, odd_weights, odd_index,
)  # fmt: skip


def test_a_hostile_model_folder_is_read_or_refused_in_one_message(tmp_path: Path) -> None:
    whole = [save_ours(tmp_path / "v3"), save_ours(tmp_path / "native", native=True), save_qwen(tmp_path / "qwen")]
    random = Random(5)
    faults: list[tuple[object, str]] = []
    refused = 0
    for number in range(FOLDERS):
        folder = tmp_path / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(random.choices(whole, (5, 2, 1))[0], folder)
        (folder / "manifest.json").unlink(missing_ok=True)  # of our own export; a stranger's folder has none
        damage = DAMAGES[number % len(DAMAGES)]
        try:
            damage(folder, random)
        except (KeyError, FileNotFoundError, UnicodeEncodeError):
            continue  # there is nothing of this kind to damage there
        runs = ["--output-dir", str(tmp_path / "runs")]
        for verb in (
            ["config-show", "--init-from", str(folder), *runs],
            ["run", "--dry-run", "--init-from", str(folder), "--skip", "pretrain", "--max-steps", "1", *runs],
            ["eval", str(folder), "--tasks", "arithmetic", "--limit", "1", "--max-new-tokens", "4"],
        ):
            ending = end_of(verb, seconds=SECONDS)
            refused += ending.code == 2
            if ending.fault is not None:
                faults.append((f"{damage.__name__} {number} {verb[0]}", ending.fault))
    assert not faults, report(faults)
    assert refused > FOLDERS, "hardly any folder was refused"
