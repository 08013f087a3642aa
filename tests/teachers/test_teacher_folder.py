"""Teachers that are given: a stage's folder, a published model folder, another family's, a file of top-k."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.convert.hf import save_hf
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.rows.batch import IGNORE
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.artifacts import load_model
from ray_pipeline.teachers.teacher_answers import retokenised
from ray_pipeline.teachers.teacher_folder import check_teacher, open_teacher, tokenizer_difference
from ray_pipeline.teachers.top_k import TopKRows, write_top_k
from ray_pipeline.teachers.transformers_teacher import TransformersTeacher, trained_documents, write_texts
from ray_pipeline.training.rank import start_rank
from tests.cli.made_run import CHAT, SEQ_LEN, TEXT
from tests.training.distill_run import MODEL, arguments, distil, largest_difference, settings_of, stage_dir, teacher_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def published(run_dir: Path) -> Path:
    """GRPO's model as a DeepSeek-V3 folder."""
    folder = run_dir / "published"
    folder.mkdir()
    model = load_model(stage_dir(run_dir, "grpo") / "model")
    tokenizer = stage_dir(run_dir, "data_prep") / "tokenizer"
    save_hf(folder, model.config, model.state_dict(), tokenizer_folder=tokenizer, model_card="")
    return folder


@pytest.fixture(scope="module")
def llama(run_dir: Path) -> Path:
    """A model of another family with the run's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=MODEL.vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(run_dir / "llama")
    own = stage_dir(run_dir, "data_prep") / "tokenizer"
    PreTrainedTokenizerFast.from_pretrained(own).save_pretrained(run_dir / "llama")
    return run_dir / "llama"


def test_a_stage_folder_and_a_published_folder_teach_as_the_stage_before(run_dir: Path, published: Path) -> None:
    expected = distil(run_dir, "before")
    assert largest_difference(distil(run_dir, "stage", teacher=str(stage_dir(run_dir, "grpo"))), expected) == 0
    given = distil(run_dir, "published-teacher", teacher=str(published), student={"num_hidden_layers": 1})
    # The published form has no MTP modules; the student has none either.
    assert largest_difference(given, expected) < 1e-6


def test_another_familys_hidden_states_are_those_of_each_document_alone(run_dir: Path, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    rank = start_rank(arguments(run_dir, "llama-hidden"))
    student = rank.engine(MODEL)
    teacher = TransformersTeacher(llama, student)
    batch = PackedRows(stage_dir(run_dir, "data_prep") / "sft" / "train").slice(0, 2)
    hidden = teacher.score(batch).extras.teacher_hidden
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    assert teacher.head is not None
    for row in range(2):
        documents = trained_documents(batch, row)
        assert len(documents) > 1
        for start, stop in documents:
            with torch.no_grad():
                expected = model(batch.tokens[row : row + 1, start:stop]).logits[0]
            found = hidden[row, start:stop] @ teacher.head.weight.t()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_another_familys_teacher_is_learned_from(run_dir: Path, llama: Path) -> None:
    given = {"teacher": str(llama), "init": "random"}
    weights = distil(run_dir, "from-llama", **given)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    check_teacher(settings_of(run_dir, **given), Layout())
    with pytest.raises(UserError, match=r"no layer of it can be copied\. Use --set distillation\.init=random"):
        check_teacher(settings_of(run_dir, teacher=str(llama)), Layout())
    layout = {"teacher_layout": {"pp_size": 1}}
    with pytest.raises(UserError, match="a teacher that transformers runs is whole on every rank"):
        check_teacher(settings_of(run_dir, **given, **layout), Layout())


def test_another_family_writes_the_same_for_the_same_seed(run_dir: Path, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), load_tokenizer(llama)
    options = {"first": 0, "seed": 3, "max_new_tokens": 100, "temperature": 1.0}
    questions = [f"What is {i}?" for i in range(16)]
    one, two = (write_texts(model, tokenizer, questions, **options) for _ in range(2))
    assert one == two
    assert one != write_texts(model, tokenizer, questions, **{**options, "seed": 4})
    assert sum(map(bool, one)) < len(one), "those that did not end by themselves are empty"


def test_answers_are_taken_over_into_the_students_tokens(run_dir: Path) -> None:
    own = load_tokenizer(stage_dir(run_dir, "data_prep") / "tokenizer")
    question, answer = {"prompt": CHAT[0]["content"], "answer": "4"}, CHAT[1]["content"]
    found = retokenised(own, question, answer, SEQ_LEN)
    assert found is not None
    assert found[0] == own.encode_prompt(question["prompt"])
    assert found[1][-1] == own.eos_id and own.decode(found[1]) == answer
    assert retokenised(own, question, answer * 40, SEQ_LEN) is None


def other_tokenizer(folder: Path) -> Path:
    save_trained(train_bpe([text[::-1] for text in TEXT] * 20, 400), folder)
    return folder


def test_another_tokenizer_is_refused_with_the_reason(run_dir: Path, published: Path, tmp_path: Path) -> None:
    own = stage_dir(run_dir, "data_prep") / "tokenizer"
    assert tokenizer_difference(published, own) is None
    other = other_tokenizer(tmp_path / "other")
    config = settings_of(run_dir, teacher=str(published))
    config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"name": str(other)})})
    with pytest.raises(
        UserError, match=r"its tokenizer is another one \(\d+ tokens have other ids.*distillation\.loss=cross_entropy"
    ):
        check_teacher(config, Layout())
    traces = {"loss": "cross_entropy", "teacher_answers": 5}
    copied = config.model_copy(update={"distillation": config.distillation.model_copy(update=traces)})
    with pytest.raises(UserError, match=r"its embeddings are of other tokens.*init=random"):
        check_teacher(copied, Layout())
    fresh = config.distillation.model_copy(update={**traces, "init": "random"})
    check_teacher(config.model_copy(update={"distillation": fresh}), Layout())


def test_a_strangers_odd_files_are_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": [], "vocab_size": "many"}))
    assert (open_teacher(str(tmp_path)).config, open_teacher(str(tmp_path)).vocab_size) == (None, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a fast tokenizer"):
        tokenizer_difference(tmp_path, stage_dir(run_dir, "data_prep") / "tokenizer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"nowhere: no such folder\. Give a run's stage folder or a Hugging Face folder"),
        (".", r"there is no config\.json in it\. It is a run; name one of its stages: .*grpo-"),
    ],
)
def test_what_is_no_teacher_is_refused(run_dir: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_teacher(str(run_dir / name))


def test_a_layout_that_cannot_hold_the_teacher_is_refused(run_dir: Path) -> None:
    config = settings_of(run_dir, teacher_layout={"pp_size": 2})
    check_teacher(config, Layout(gpus=2, dp=2))
    with pytest.raises(UserError, match=r"distillation\.teacher_layout: .*pp_size=2"):
        check_teacher(config, Layout())
    with pytest.raises(UserError, match=r"teacher_layout: fewer ranks \(min_gpus=1\) could not hold it"):
        check_teacher(config, Layout(gpus=2, dp=2, min_gpus=1))


def stored(run_dir: Path, folder: Path, k: int, temperature: float = 1.0) -> str:
    data = stage_dir(run_dir, "data_prep")
    model = load_model(stage_dir(run_dir, "grpo") / "model").eval()
    rows = PackedRows(data / "sft" / "train")
    write_top_k(model, rows, data / "tokenizer", folder, k=k, temperature=temperature)
    return f"topk:{folder}"


def test_all_log_probabilities_on_disk_teach_as_the_teacher_itself(run_dir: Path, tmp_path: Path) -> None:
    settings = {"init": "random", "temperature": 2.0}
    expected = distil(run_dir, "live", **settings)
    name = stored(run_dir, tmp_path / "all", MODEL.vocab_size, temperature=2.0)
    assert largest_difference(distil(run_dir, "stored", teacher=name, **settings), expected) < 1e-5


def test_the_likeliest_tokens_are_those_of_the_rows(run_dir: Path, tmp_path: Path) -> None:
    data = stage_dir(run_dir, "data_prep")
    rows = PackedRows(data / "sft" / "train")
    name = stored(run_dir, tmp_path / "few", 3)
    batch = TopKRows(rows, data / "tokenizer", Path(name.removeprefix("topk:")), 1.0).batch(0, 1, 4)
    plain = rows.batch(0, 1, 4)
    assert torch.equal(batch.tokens, plain.tokens)
    with torch.no_grad():
        logits = load_model(stage_dir(run_dir, "grpo") / "model").eval()(plain.tokens, plain.doc_ids)
    expected = logits.log_softmax(-1).topk(3)
    kept = plain.labels != IGNORE
    torch.testing.assert_close(batch.extras.teacher_topk_logprobs[kept], expected.values[kept])
    assert torch.equal(batch.extras.teacher_topk_ids[kept], expected.indices[kept])


def test_a_file_made_of_something_else_is_refused(run_dir: Path, tmp_path: Path) -> None:
    data = stage_dir(run_dir, "data_prep")
    folder = tmp_path / "made"
    stored(run_dir, folder, 2)
    train, own = PackedRows(data / "sft" / "train"), data / "tokenizer"
    with pytest.raises(UserError, match=r"another temperature \(1\.0, not distillation\.temperature=2\.0\)"):
        TopKRows(train, own, folder, 2.0)
    with pytest.raises(UserError, match="another tokenizer"):
        TopKRows(train, other_tokenizer(tmp_path / "other"), folder, 1.0)
    with pytest.raises(UserError, match="another conversations"):
        TopKRows(PackedRows(data / "pretrain" / "train"), own, folder, 1.0)
    path = folder / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"00000\.safetensors: damaged: its SHA-256.*Write it again"):
        TopKRows(train, own, folder, 1.0)
    (folder / "topk.json").write_text(json.dumps({"k": 1}))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        TopKRows(train, own, folder, 1.0)
    with pytest.raises(UserError, match=r"topk:.*nowhere: there is no topk\.json in it"):
        TopKRows(train, own, tmp_path / "nowhere", 1.0)
