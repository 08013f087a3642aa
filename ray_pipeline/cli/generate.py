"""`generate`: let a run's model write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import find_run, output_dir
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from ray_pipeline.data.tokenizer import ChatTokenizer


@click.command()
@click.argument("run")
@click.argument("prompt")
@click.option("--stage", help="pretrain, sft, grpo or distillation. Default: pretrain, with --chat grpo or sft.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy. Default: 0.8 for raw text, 0 for chat.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--raw/--chat", default=None, help="Continue the text, or answer it. Default: by stage.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def generate(
    run: str,
    prompt: str,
    stage: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float,
    seed: int,
    raw: bool | None,
    **options: str | None,
) -> int:
    """Continue PROMPT with the pretrained model of RUN, or answer it (--chat) with the post-trained one."""
    from ray_pipeline.cli.stage_folders import choose_stage, finished_stages

    if not prompt.strip():
        raise UserError('PROMPT is empty: give some text, for example "To be, or not to be".')
    run_dir = find_run(run, output_dir(options["output_dir"]))
    # Post-trained models answer; the one that was only pretrained writes text. The student is asked for by name.
    candidates: tuple[str, ...] = ("pretrain", "sft", "grpo", "distillation")
    if stage is None:
        candidates = ("sft", "grpo") if raw is False else ("pretrain",)
    name, folder = choose_stage(run_dir, stage, candidates)
    raw = name == "pretrain" if raw is None else raw
    data = finished_stages(run_dir)["data_prep"]
    if temperature is None:
        temperature = 0.8 if raw else 0.0
    write(folder / "model", data / "tokenizer", prompt, max_new_tokens, temperature, top_p, seed, raw)
    return 0


def write(
    model_folder: Path,
    tokenizer_folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
) -> None:
    """Load, then print the text as it is made.

    Raises:
        UserError: damaged files, or a prompt that fills the context.
    """
    import torch

    from model.generate.decode import Decoder
    from model.generate.decode import generate as decode
    from ray_pipeline.artifacts import load_model
    from ray_pipeline.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = prompt_tokens(tokenizer, prompt, raw=raw)
    model = load_model(model_folder).eval()
    context = model.config.max_position_embeddings
    if len(tokens) >= context:
        raise UserError(f"PROMPT is {len(tokens)} tokens long: the model reads {context}, answer included. Shorten it.")
    if torch.cuda.is_available():
        model.cuda()
    printer = Printer(tokenizer, tokens if raw else [])
    if raw:
        click.echo(prompt, nl=False)
    decode(
        Decoder(model),
        [tokens],
        max_new_tokens=max_new_tokens,
        eos_ids={tokenizer.eos_id},
        temperature=temperature,
        top_p=top_p,
        seeds=[seed],
        on_token=lambda _, token: printer.add(token),
    )
    printer.finish()


def prompt_tokens(tokenizer: ChatTokenizer, prompt: str, *, raw: bool) -> list[int]:
    """Ids to continue: a document's beginning, or a question in the chat template."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)] if raw else tokenizer.encode_prompt(prompt)


class Printer:
    """Prints text as tokens arrive. What is decoded is the whole text each time, because a token's text can depend on
    the one before it; a character spread over several byte tokens is held back until it is whole."""

    def __init__(self, tokenizer: ChatTokenizer, before: list[int]):
        self.tokenizer = tokenizer
        self.tokens = list(before)
        self.printed = len(tokenizer.decode(before))

    def add(self, token: int) -> None:
        """Print what is complete."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        whole = text.rstrip("\ufffd")
        # Four bytes are the longest character of UTF-8: what is still open after that is simply not text.
        ready = text if len(text) - len(whole) > 3 else whole
        click.echo(ready[self.printed :], nl=False)
        self.printed = max(self.printed, len(ready))

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        click.echo(self.tokenizer.decode(self.tokens)[self.printed :])
