"""Making a tokenizer folder: training a byte-level BPE, or copying a pretrained one. `tokenizer` reads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ray_pipeline.data.chat.chat import ChatTemplate
from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE, DEEPSEEK_TOOLS_TEMPLATE, PLAIN, PLAIN_TEMPLATE
from ray_pipeline.data.chat.template_files import DEFAULT, FILE, NAMED_FOLDER, choose
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.errors import UserError, first_line
from ray_pipeline.records.artifacts import atomic_path, write_json
from ray_pipeline.tools.format import CALLS_BEGIN, TOOL_TOKENS

# DeepSeek-V3's own strings.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_STRINGS = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT)
# Known to the vocabulary but not "special": decoding keeps them, since the answer's format is graded on them.
THINK = (THINK_OPEN, THINK_CLOSE)
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)


def train_bpe(texts: Iterable[str], vocab_size: int, *, tools: bool = False) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv:1508.07909) in which each digit is a token of its own.

    The pre-tokenizer is the one llama.cpp calls "smollm". Little text gives fewer entries than asked for.

    Args:
        tools: with the tokens of tool calls.
    Raises:
        UserError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    written = THINK + TOOL_TOKENS if tools else THINK
    smallest = 256 + len(SPECIAL) + len(written)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL) + len(written)} special "
            f"tokens need {smallest}. Use --set tokenizer.vocab_size=512."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(written),
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in written])
    return tokenizer


def trained_template(*, tools: bool, chat_template: str | None = None) -> ChatTemplate:
    """The chat template of a tokenizer trained here: DeepSeek's, or what `tokenizer.chat_template` names: "plain", or a
    file."""
    own = DEEPSEEK_TOOLS_TEMPLATE if tools else DEEPSEEK_TEMPLATE
    chosen = choose({DEFAULT: own, PLAIN: PLAIN_TEMPLATE}, chat_template, Path("a trained tokenizer"))
    assert chosen is not None
    return ChatTemplate(chosen.source, SPECIAL_STRINGS)


def save_trained(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> ChatTokenizer:
    """Write the folder transformers loads as PreTrainedTokenizerFast, and read it back.

    How many tokens a model holds is the model's matter, so no `model_max_length` is written.
    """
    tools = tokenizer.token_to_id(CALLS_BEGIN) is not None
    config: dict[str, Any] = {
        **SPECIAL_STRINGS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "additional_special_tokens": [USER, ASSISTANT],
        "chat_template": trained_template(tools=tools, chat_template=chat_template).source,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "tokenizer.json") as aside:
        aside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**SPECIAL_STRINGS, "additional_special_tokens": [USER, ASSISTANT]})
    return load_tokenizer(folder).check()


def copy_pretrained(name: str, folder: Path, chat_template: str | None = None) -> ChatTokenizer:
    """Copy a tokenizer folder, or fetch a hub name, and check that conversations can be trained with it.

    Args:
        chat_template: the only template that the copy has, as `tokenizer.chat_template` names it; None: the folder's.
    Raises:
        UserError: not found, no fast tokenizer, or an unfit chat template.
    """
    source = Path(name)
    if not source.is_dir():
        source = fetch_from_hub(name)
    loaded = load_tokenizer(source, chat_template).check()
    folder.mkdir(parents=True, exist_ok=True)
    named = [f"{NAMED_FOLDER}/{path.name}" for path in sorted((source / NAMED_FOLDER).glob("*.jinja"))]
    for file in [*COPIED, *(named if chat_template is None else [])]:
        if (source / file).is_file():
            (folder / file).parent.mkdir(exist_ok=True)
            with atomic_path(folder / file) as aside:
                shutil.copyfile(source / file, aside)
    if chat_template is not None:
        with atomic_path(folder / FILE) as aside:
            aside.write_text(loaded.template.source, encoding="utf-8")
    return load_tokenizer(folder)


def fetch_from_hub(name: str) -> Path:
    """Folder of a tokenizer by its hub name, from the local cache or the network.

    Raises:
        UserError: no such repository, no access, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    given = f'tokenizer.name="{name}"'
    way_out = "Give a local folder, set HF_ENDPOINT to a reachable mirror, or use --set tokenizer.name=train."
    try:
        return Path(snapshot_download(name, allow_patterns=[*COPIED, f"{NAMED_FOLDER}/*.jinja"]))
    except HFValidationError:
        raise UserError(f"{given}: no such folder, and not a hub name like org/name. {way_out}") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{given}: the hub cannot be reached and nothing is cached. {way_out}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{given}: the hub refuses it ({first_line(error)}). {way_out}") from None
    except OSError as error:
        raise UserError(f"{given}: the hub cannot be reached ({type(error).__name__}). {way_out}") from None
