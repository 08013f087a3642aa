"""`chat`: talk to a trained model in the terminal."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.options import check_temperature
from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError
from ray_pipeline.settings.section import MOST_SEED

if TYPE_CHECKING:
    from ray_pipeline.cli.chat_screen import Screen
    from ray_pipeline.evaluation.conversation import Conversation

HELP = """\
/system TEXT   what the model is told before the conversation (without TEXT: nothing)
/temp NUMBER   temperature of the answers; 0 always takes the likeliest token
/think         hide or show what the model thinks
/retry         answer the last message again, with another seed
/save FILE     write the conversation as one line of JSON, in the form that --sft-data reads
/clear         begin a new conversation
/quit          end (so does Ctrl-D); Ctrl-C stops an answer"""
WIDEST_TEMPERATURE = 100.0


@click.command()
@click.argument("model")
@click.option("--stage", help="Of a run. Default: the last of pretrain, sft, dpo, grpo; RUN:STAGE says the same.")
@click.option("--system", default="", help="What the model is told before the conversation.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--max-new-tokens", type=click.IntRange(1, 1 << 27), help="Of an answer. Default: as its run, or 512.")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option("--hide-thinking", is_flag=True, help="Show a count in place of what is thought; /think changes it.")
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def chat(
    model: str,
    stage: str | None,
    system: str,
    temperature: float,
    max_new_tokens: int | None,
    seed: int,
    hide_thinking: bool,
    runs_dir: str | None,
) -> int:
    """Talk to MODEL: a run, RUN:STAGE, a stage's folder or a Hugging Face folder. /help lists the commands."""
    from ray_pipeline.cli.eval_target import find_model

    check_temperature(temperature)
    source = find_model(model, stage, output_dir(runs_dir))

    from ray_pipeline.cli.chat_screen import Screen
    from ray_pipeline.evaluation.conversation import Conversation
    from ray_pipeline.evaluation.models import load

    talk = Conversation(
        load(source), system=system, temperature=temperature, seed=seed,
        max_new_tokens=max_new_tokens or source.max_new_tokens or 512,
    )  # fmt: skip
    screen = Screen(hide_thinking=hide_thinking)
    screen.note(talk.describe() + " /help lists the commands.")
    while (line := screen.ask()) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not command(talk, screen, line.strip(), source.heldout):
                    break
            else:
                answer(talk, screen, line)
        except UserError as error:
            screen.warn(str(error))
    return 0


def answer(talk: Conversation, screen: Screen, message: str | None) -> None:
    """Send a message (None: the last one again) and print the answer as it is written; Ctrl-C ends it where it is.

    Raises:
        UserError: the message does not fit into the model's context.
    """
    with screen.answering() as show:
        try:
            reply = talk.send(message, show) if message is not None else talk.retry(show)
        except KeyboardInterrupt:
            # `guarded` ignores further signals after the first that is to end the program.
            if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
                raise
            reply = talk.keep_partial()
    for note in reply.notes:
        screen.note(note)


def command(talk: Conversation, screen: Screen, line: str, heldout: Path | None) -> bool:
    """Carry out a line that begins with `/`; False where it ends the chat.

    Args:
        heldout: the file of the questions that the model's run held out, if it is of a run.
    Raises:
        UserError: an unknown command, or one that lacks what it needs.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        screen.note(HELP + kinds(heldout))
    elif name == "/system":
        talk.system = rest
        screen.note("The system prompt is set." if rest else "There is no system prompt.")
    elif name == "/temp":
        talk.temperature = _temperature(rest)
        screen.note(f"The temperature is {talk.temperature:g}.")
    elif name == "/think":
        screen.turn_thinking()
    elif name == "/retry":
        answer(talk, screen, None)
    elif name == "/save":
        screen.note(f"Saved to {_save(talk, rest)}.")
    elif name == "/clear":
        talk.clear()
        screen.note("A new conversation.")
    else:
        raise UserError(f"{name}: no such command. /help lists them.")
    return True


def kinds(heldout: Path | None) -> str:
    """The kinds of question that a run was trained for, each with one that was held out; nothing where none are known.

    Raises:
        UserError: the run's file of held-out questions is damaged.
    """
    from ray_pipeline.data.tasks.question import prepared_questions

    if heldout is None:
        return ""
    found: dict[str, str] = {}
    for question in prepared_questions(heldout):
        found.setdefault(question["category"] or "questions", question["prompt"])
    return "\n\nIt was trained for questions like these:" + "".join(
        f"\n{kind:14} {prompt}" for kind, prompt in sorted(found.items())
    )


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= WIDEST_TEMPERATURE:
        raise UserError(f"/temp {text}: must be a number from 0 to {WIDEST_TEMPERATURE:g}, for example /temp 0.8.")
    return value


def _save(talk: Conversation, name: str) -> Path:
    if not name:
        raise UserError("/save: to which file? For example /save talk.jsonl.")
    path = Path(name).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:  # never in place of another file
            file.write(talk.as_json() + "\n")
    except FileExistsError:
        raise UserError(f"/save {name}: there is such a file already. Give another name.") from None
    except OSError as error:
        raise UserError(f"/save {name}: cannot be written ({error.strerror}). Give another name.") from None
    return path
