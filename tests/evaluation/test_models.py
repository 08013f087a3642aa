"""Every kind of model folder answers alike through one interface: greedy text, log-probabilities, end tokens."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.convert.hf_load import load_hf
from model.generate.decode import Decoder, generate
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import EOS, save_trained, train_bpe
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.asking import AskSettings, ask, count_thinking
from ray_pipeline.evaluation.model_source import describe_folder
from ray_pipeline.evaluation.models import LanguageModel, load
from ray_pipeline.evaluation.tasks import Item
from tests.evaluation.made_models import save_ours, save_qwen

FORMS = {"hf": "folder", "native": "folder", "qwen": "transformers"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        "hf": save_ours(place / "hf"),
        "native": save_ours(place / "native", native=True),
        "qwen": save_qwen(place / "qwen"),
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, LanguageModel]:
    return {name: load(describe_folder(path)) for name, path in folders.items()}


def items(*prompts: str) -> list[Item]:
    return [Item(str(i), prompt, "") for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", FORMS)
def test_a_folder_tells_how_it_is_loaded(name: str, folders: dict[str, Path]) -> None:
    source = describe_folder(folders[name])
    assert (source.form, source.folder, source.tokenizer) == (FORMS[name], folders[name], folders[name])


@pytest.mark.parametrize("name", FORMS)
def test_logprobs_are_those_of_a_plain_forward_pass(name: str, models: dict[str, LanguageModel]) -> None:
    model = models[name]
    encode = model.tokenizer.encode
    pairs = [(model.prompt("What is 12+34?"), encode(text)) for text in ("4", "46 and two", "the cat")]
    pairs.append((model.prompt("two"), encode("four")))
    for (context, continuation), (logprob, greedy) in zip(pairs, model.logprobs(pairs), strict=True):
        logits = model.backend.logits(torch.tensor([context + continuation]))[0].double()
        rows = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        assert logprob == pytest.approx(float(rows[range(len(continuation)), continuation].sum()), abs=1e-4)
        assert greedy is (rows.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize("name", FORMS)
def test_what_greedy_writes_is_greedy_by_its_logprobs(name: str, models: dict[str, LanguageModel]) -> None:
    model = models[name]
    prompt = model.prompt("What is 12+34?")
    [written] = model.backend.generate([prompt], max_new_tokens=9, temperature=0, seeds=[0], eos_ids=model.eos_ids)
    [(_, greedy)] = model.logprobs([(prompt, written.tokens)])
    assert greedy and 1 <= len(written.tokens) <= 9
    other = [*written.tokens[:-1], (written.tokens[-1] + 1) % model.backend.vocab_size]
    assert model.logprobs([(prompt, other)])[0][1] is False


@pytest.mark.parametrize("name", FORMS)
def test_answers_do_not_depend_on_the_batch(name: str, models: dict[str, LanguageModel]) -> None:
    asked = items("two", "What is 12+34?", "the cat sat on the mat", "no")
    whole = ask(models[name], asked, AskSettings(max_new_tokens=8))
    assert ask(models[name], asked, AskSettings(max_new_tokens=8, max_batch=1)) == whole
    assert ask(models[name], asked[1:2], AskSettings(max_new_tokens=8)) == whole[1:2]


def test_our_samples_do_not_depend_on_the_batch_and_differ(models: dict[str, LanguageModel]) -> None:
    settings = AskSettings(samples=4, temperature=1.0, max_new_tokens=8, seed=5)
    asked = items("two", "What is 12+34?", "the cat")
    whole = ask(models["hf"], asked, settings)
    assert ask(models["hf"], asked[1:], settings) == whole[1:]
    assert len({answer.completion for answer in whole[0]}) > 1
    assert ask(models["hf"], asked, replace(settings, seed=6)) != whole


def test_ours_is_the_decoder_on_the_published_weights(
    folders: dict[str, Path], models: dict[str, LanguageModel]
) -> None:
    config, state = load_hf(folders["hf"])
    model = Transformer(config)
    model.load_state_dict(state)
    tokenizer = models["hf"].tokenizer
    prompts = [tokenizer.encode_prompt(text) for text in ("two", "What is 12+34?")]
    expected = generate(Decoder(model.eval()), prompts, max_new_tokens=8, eos_ids={tokenizer.eos_id}, temperature=0)
    found = models["hf"].backend.generate(
        prompts, max_new_tokens=8, temperature=0, seeds=[0, 0], eos_ids=models["hf"].eos_ids
    )
    assert [w.tokens for w in found] == [c.tokens for c in expected]


def test_transformers_is_asked_without_the_folders_own_sampling(folders: dict[str, Path]) -> None:
    from transformers import Qwen2ForCausalLM

    model = load(describe_folder(folders["qwen"]))
    ids = model.prompt("What is 12+34?")
    theirs = Qwen2ForCausalLM.from_pretrained(folders["qwen"], dtype=torch.float32).eval()
    tokens = list(ids)
    with torch.inference_mode():
        while len(tokens) < len(ids) + 12 and (len(tokens) == len(ids) or tokens[-1] not in model.eos_ids):
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
    [written] = model.backend.generate([ids], max_new_tokens=12, temperature=0, seeds=[0], eos_ids=model.eos_ids)
    assert written.tokens == tokens[len(ids) :]


def test_end_tokens_come_from_the_files(folders: dict[str, Path], models: dict[str, LanguageModel]) -> None:
    eos = models["qwen"].tokenizer.eos_id
    assert models["qwen"].eos_ids == {eos, 1, 40}, "generation_config.json lists two"
    assert eos in models["hf"].eos_ids


def test_a_prompt_longer_than_the_context_is_answered_with_nothing(models: dict[str, LanguageModel]) -> None:
    long, short = ask(models["hf"], items("the cat " * 200, "two"), AskSettings(samples=1, max_new_tokens=4))
    assert (long[0].completion, long[0].fits, short[0].fits) == ("", False, True)


@pytest.mark.parametrize("name", FORMS)
def test_rows_that_reach_the_end_of_the_context_do_not_touch_the_others(
    name: str, models: dict[str, LanguageModel]
) -> None:
    model = models[name]
    room = model.backend.context
    longest = next(n for n in range(room, 0, -1) if len(model.prompt("two " * n)) < room - 3)
    asked = items("two", "two " * longest, "no")
    replies = ask(model, asked, AskSettings(max_new_tokens=120))
    assert replies == [ask(model, [item], AskSettings(max_new_tokens=120))[0] for item in asked]
    assert len(model.prompt(asked[1].prompt)) + replies[1][0].tokens <= room


def test_options_are_measured_as_answers_are_trained(models: dict[str, LanguageModel]) -> None:
    model = models["hf"]
    question, answer = model.answered("two", f"four{EOS}")
    assert question == model.prompt("two")
    assert model.tokenizer.decode(answer) == f"four{EOS}" and model.tokenizer.eos_id not in answer


def test_a_template_that_opens_the_thinking_counts_as_thinking(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "opens")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    source = template.read_text() if template.exists() else values["chat_template"]
    template.write_text(source.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}"))
    model = load(describe_folder(folder))
    prompt = model.prompt("two")
    assert model.opens_thinking(prompt)
    assert model.text(prompt, model.tokenizer.encode("four")) == "<think>four"
    assert not model.opens_thinking(prompt[:-4])
    question, answer = model.answered("two", "four")
    assert question == prompt and model.tokenizer.decode(answer) == "\n</think>\n\nfour"


OPEN, CLOSE = [7], [8]


@pytest.mark.parametrize(
    ("tokens", "inside", "expected"),
    [
        ([7, 1, 2, 8, 3], False, (2, 1)),
        ([1, 2, 8, 3, 4], True, (2, 2)),
        ([7, 1, 2], False, (2, 0)),
        ([1, 2], False, (0, 2)),
        ([7, 7, 8, 8], False, (1, 1)),
        ([], True, (0, 0)),
    ],
)
def test_thinking_tokens_are_those_between_the_marks(
    tokens: list[int], inside: bool, expected: tuple[int, int]
) -> None:
    assert count_thinking(tokens, OPEN, CLOSE, inside=inside) == expected


def test_marks_of_several_tokens_are_found() -> None:
    assert count_thinking([5, 6, 1, 5, 9, 2], [5, 6], [5, 9], inside=False) == (1, 1)


def broken(folder: Path, name: str, change: object) -> Path:
    path = folder / name
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | change) if isinstance(change, dict) else str(change))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("config.json", {"model_type": "deepseek_v9"}, "is neither one of ours"),
        ("config.json", "[1]", "must hold a JSON object"),
        ("config.json", "{", "not valid JSON"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(name: str, change: object, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        describe_folder(broken(save_qwen(tmp_path / "model"), name, change))


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json",
     "chat_template.jinja"],
)  # fmt: skip
def test_a_strangers_files_are_refused_at_once_by_name(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["hf"], folder)
    (folder / "manifest.json").unlink(missing_ok=True)  # of our own export; a stranger's folder has none
    path = folder / name
    for content in (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 9000, b"\xff\xfe\x00", None):
        if content is None:
            os.truncate(path, 1 << 33)  # a file with a hole: it takes no disk
        elif path.suffix == ".json" or content.startswith(b"\xff"):
            path.write_bytes(content)
        else:
            continue  # any text is a template, if not of a chat
        started = time.process_time()
        with pytest.raises(UserError, match=re.escape(name)) as caught:
            source = describe_folder(folder)
            source.eos_ids(source.read_tokenizer())
        assert len(str(caught.value)) < 1000 and time.process_time() - started < 5


def test_what_is_missing_is_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"holds no model \(there is no config.json\)"):
        describe_folder(tmp_path)
    folder = save_qwen(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="there is no safetensors file"):
        describe_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="there is no tokenizer.json"):
        describe_folder(folder)


def test_another_models_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    source = describe_folder(folders["hf"])
    words = ["".join(letters) for letters in itertools.permutations("abcdef")]
    save_trained(train_bpe(words, 400), tmp_path)
    with pytest.raises(UserError, match="does not belong to"):
        load(replace(source, tokenizer=tmp_path))
