"""`generate`: let a model write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.options import check_temperature
from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError
from ray_pipeline.settings.section import MOST_SEED

if TYPE_CHECKING:
    from model.generate.decode import Decoder
    from ray_pipeline.data.chat.tokenizer import ChatTokenizer
    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.evaluation.models import LanguageModel

POSITIVE = click.FloatRange(0, 1e3, min_open=True)


@dataclass(frozen=True)
class GenerateOptions:
    """How to write; the options of the same names. `temperature` is 0 with beams, else as asked for or by stage."""

    raw: bool
    max_new_tokens: int
    temperature: float
    seed: int
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    think_budget: int | None
    speculative: bool
    num_beams: int
    length_penalty: float


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--stage", help="Of a run. Default: pretrain, with --chat the last; RUN:STAGE says the same.")
@click.option("--raw/--chat", default=None, help="Continue the text, or answer it. Default: by stage; folders answer.")
@click.option("--max-new-tokens", type=click.IntRange(1, 1 << 27), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy. Default: 0.8 for raw text, 0 for chat.")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option(
    "--top-k", type=click.IntRange(0, 1 << 24), default=0, help="Draw from the k likeliest tokens. Default: all."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="Least share of the likeliest token's chance.")
@click.option("--repetition-penalty", type=POSITIVE, default=1.0, help="Above 1: say less that was said. Default: 1.")
@click.option("--stop", multiple=True, help="Text that ends the answer and is not printed. May be repeated.")
@click.option(
    "--think-budget", type=click.IntRange(0, 1 << 27), help="Tokens inside <think> before </think> is forced."
)
@click.option("--speculative", is_flag=True, help="Let the MTP modules draft tokens. Answers keep their distribution.")
@click.option("--num-beams", type=click.IntRange(1, 4096), default=1, help="Beam search with this many. Default: none.")
@click.option(
    "--length-penalty",
    type=click.FloatRange(-1e3, 1e3),
    default=1.0,
    help="Beams: 0 ranks sums, 1 means of logprobs. Default: 1.",
)
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def generate(
    model: str,
    prompt: str,
    stage: str | None,
    raw: bool | None,
    temperature: float | None,
    runs_dir: str | None,
    **options: Any,
) -> int:
    """Continue PROMPT, or answer it (--chat), by MODEL: a run, RUN:STAGE, a stage's folder or a Hugging Face folder."""
    from ray_pipeline.cli.eval_target import find_model
    from ray_pipeline.dag.ledger import RunFile, read_record

    if not prompt.strip():
        raise UserError('PROMPT is empty: give some text, for example "To be, or not to be".')
    check_options(temperature, options)

    def of_run(run_dir: Path) -> tuple[str, ...]:
        # Post-trained models answer; the one that was only pretrained writes text. The student is asked for by name.
        answers = raw is False or "pretrain" not in RunFile(run_dir).chain
        return ("sft", "dpo", "grpo") if answers else ("pretrain",)

    source = find_model(model, stage, output_dir(runs_dir), default=of_run)
    if raw is None:
        record = read_record(source.folder.parent) if source.form == "stage" else None
        raw = record is not None and record.stage == "pretrain"
    if temperature is None:
        temperature = 0.8 if raw and options["num_beams"] == 1 else 0.0
    check_cuts(temperature, options)
    settings = GenerateOptions(raw=raw, temperature=temperature, **options)
    write(source, prompt, settings)
    return 0


def check_options(temperature: float | None, options: dict[str, Any]) -> None:
    """Refuse what contradicts itself or is no number.

    Raises:
        UserError: naming the options.
    """
    if temperature is not None:
        check_temperature(temperature)
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number.")
    if not all(options["stop"]):
        raise UserError('--stop "": an empty text is part of every answer. Give at least a letter, or omit it.')
    beams = options["num_beams"]
    if beams == 1:
        if options["length_penalty"] != 1:
            raise UserError(
                f"--length-penalty {options['length_penalty']:g} ranks the answers of a beam search, and there is "
                "none. Add --num-beams 4, or omit it."
            )
        return
    given = {
        f"--temperature {temperature}": bool(temperature),
        f"--top-k {options['top_k']}": options["top_k"] > 0,
        f"--top-p {options['top_p']:g}": options["top_p"] < 1,
        f"--min-p {options['min_p']:g}": options["min_p"] > 0,
        f"--repetition-penalty {options['repetition_penalty']:g}": options["repetition_penalty"] != 1,
        "--stop": bool(options["stop"]),
        f"--think-budget {options['think_budget']}": options["think_budget"] is not None,
        "--speculative": options["speculative"],
    }
    for option, is_given in given.items():
        if is_given:
            raise UserError(
                f"--num-beams {beams} cannot be combined with {option}: beam search ranks whole answers by the model's "
                "own probabilities and neither draws nor changes them. Leave out one of the two."
            )


def check_cuts(temperature: float, options: dict[str, Any]) -> None:
    """Refuse cuts of a distribution that nothing is drawn from.

    Raises:
        UserError: naming the option.
    """
    cuts = {"top-k": options["top_k"] > 0, "top-p": options["top_p"] < 1, "min-p": options["min_p"] > 0}
    for name, is_given in cuts.items():
        if is_given and temperature == 0:
            raise UserError(
                f"--{name} {options[name.replace('-', '_')]:g} changes nothing at temperature 0, where the likeliest "
                "token is always taken. Add --temperature 0.8, or omit it."
            )


def write(source: ModelSource, prompt: str, options: GenerateOptions) -> None:
    """Load, then print the text as it is made.

    Raises:
        UserError: damaged files, an architecture that is none of ours, a prompt that cannot be continued, or a model
            that cannot draft.
    """
    from model.convert.tokenizer_start import begins_with_bos
    from ray_pipeline.cli.eval_target import was_pretrained
    from ray_pipeline.data.chat.completion_text import finite_logits
    from ray_pipeline.data.tasks.question import THINK_OPEN
    from ray_pipeline.evaluation.models import NativeBackend, load

    if source.form == "transformers":
        raise UserError(f"{source.folder}: its architecture is none of ours, which `generate` runs. Use `chat`.")
    begins = was_pretrained(source) or begins_with_bos(source.tokenizer)
    tokens = prompt_tokens(source.read_tokenizer(), prompt, raw=options.raw, begins=begins)
    loaded = load(source)
    assert isinstance(loaded.backend, NativeBackend)
    context = loaded.backend.context
    if len(tokens) >= context:
        raise UserError(f"PROMPT is {len(tokens)} tokens long: the model reads {context}, answer included. Shorten it.")
    if options.speculative and not loaded.backend.model.config.num_nextn_predict_layers:
        raise UserError(
            f"--speculative: the model in {source.folder} has num_nextn_predict_layers=0, no MTP module to draft with. "
            "Leave it out."
        )
    if options.raw:
        click.echo(prompt, nl=False)
    elif loaded.opens_thinking(tokens):
        click.echo(THINK_OPEN, nl=False)
    run = search if options.num_beams > 1 else stream
    with finite_logits(f"the model in {source.folder}", "Take an earlier stage's with --stage, or train it again."):
        run(loaded, loaded.backend.decoder, tokens, options)


def stream(model: LanguageModel, decoder: Decoder, tokens: list[int], options: GenerateOptions) -> None:
    """Print the answer token by token."""
    from model.generate.decode import generate as decode
    from model.generate.stopping import StopStrings
    from ray_pipeline.data.chat.completion_text import think_budget

    tokenizer = model.tokenizer
    stop = StopStrings(options.stop, tokenizer.decode) if options.stop else None
    printer = Printer(tokenizer, tokens if options.raw else [], options.stop)
    [completion] = decode(
        decoder,
        [tokens],
        max_new_tokens=options.max_new_tokens,
        eos_ids=set(model.eos_ids),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=stop,
        think=think_budget(tokenizer, options.think_budget),
        speculative=options.speculative,
        seeds=[options.seed],
        on_token=lambda _, token: printer.add(token),
    )
    printer.finish()
    if options.speculative:
        drafted, accepted = completion.drafted, completion.accepted
        share = f" ({accepted / drafted:.0%})" if drafted else ""
        click.echo(f"{accepted} of {drafted} drafted tokens accepted{share}", err=True)


def search(model: LanguageModel, decoder: Decoder, tokens: list[int], options: GenerateOptions) -> None:
    """Print the best answer that a beam search finds."""
    from model.generate.beam import beam_search

    [found] = beam_search(
        decoder,
        [tokens],
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        eos_ids=set(model.eos_ids),
        length_penalty=options.length_penalty,
    )
    printer = Printer(model.tokenizer, tokens if options.raw else [])
    for token in found[0].completion.tokens:
        printer.add(token)
    printer.finish()


def prompt_tokens(tokenizer: ChatTokenizer, prompt: str, *, raw: bool, begins: bool) -> list[int]:
    """Ids to continue: a document's beginning, with bos if it `begins` so, or a question in the chat template."""
    if not raw:
        return tokenizer.encode_prompt(prompt)
    return ([tokenizer.bos_id] if begins else []) + tokenizer.encode(prompt)


class Printer:
    """Prints text as tokens arrive: whole characters, and nothing that may turn out to begin a stop string."""

    def __init__(self, tokenizer: ChatTokenizer, before: Sequence[int], stop: Sequence[str] = ()):
        from model.generate.stopping import StopWatch

        self.watch = StopWatch(stop, tokenizer.decode, before)
        self.printed = 0

    def add(self, token: int) -> None:
        """Print what is complete."""
        self.watch.add(token)
        self._print(self.watch.safe())

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        self._print(len(self.watch.finish()))
        click.echo()

    def _print(self, end: int) -> None:
        click.echo(self.watch.text[self.printed : end], nl=False)
        self.printed = max(self.printed, end)
