"""`eval`: ask a model questions with known answers, report how well it does, and compare it with another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.eval_options import levels, sampling, split_names
from ray_pipeline.cli.output_files import report_writers
from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError
from ray_pipeline.settings.section import MOST_SEED

if TYPE_CHECKING:
    from ray_pipeline.evaluation.asking import AskSettings
    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.evaluation.outcome import Report
    from ray_pipeline.evaluation.tasks import Task

DEFAULT_NEW_TOKENS = 512  # where no run says how long its answers are


@click.command(name="eval")
@click.argument("target", required=False, metavar="RUN|PATH")
@click.option("--tasks", help="Names with commas between them; --list shows them. Default: heldout, for a run.")
@click.option("--stage", help="Of a run. Default: the last finished of pretrain, sft, dpo and grpo.")
@click.option(
    "--samples", type=click.IntRange(max=100_000), default=1, show_default=True, help="Answers to each question."
)
@click.option("--k", "ks", help="The k of pass@k and maj@k, with commas. Default: powers of two up to --samples.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy. Default: 0, or 0.6 with --samples.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1, 1 << 27), help="Of one answer. Default: the run's own limit, or 512."
)
@click.option("--limit", type=click.IntRange(1, 10**9), help="Questions of each task. Default: the task's own number.")
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Of questions and answers."
)
@click.option("--difficulty", metavar="A-B", help="Only questions of these levels, 1 to 5, for example 1-3.")
@click.option("--compare", help="Another RUN, PATH or report (.json): a paired test on the same questions.")
@click.option("--tools", help="Tools the model may call, for example calculator,python; default: those of the run.")
@click.option("--without-landlock", is_flag=True, help="Run answers' programs although they could read all your files.")
@click.option(
    "--max-batch", type=click.IntRange(1, 1 << 16), default=256, show_default=True, help="Answers written together."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the whole report here.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write a page to read here.")
@click.option("--report", "reports", multiple=True, metavar="NAME=FILE", help="Write by any other reporter.")
@click.option(
    "--backend", type=click.Choice(["auto", "modal"]), default="auto", show_default=True,
    help="modal: of a RUN there, on Modal's CPUs; the report comes here.",
)  # fmt: skip
@click.option("--no-tracking", is_flag=True, help="Tell the run's trackers nothing.")
@click.option("--list", "list_tasks", is_flag=True, help="Show the tasks and stop.")
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def evaluate(target: str | None, list_tasks: bool, **options: Any) -> int:
    """Ask the model of a RUN, or of a folder (PATH), questions with known answers.

    PATH may be a stage's folder, an exported or published Hugging Face folder, or a report (.json) of an earlier
    evaluation, which is then shown and compared without loading anything.
    """
    from rich.console import Console

    from ray_pipeline.report.evaluation.terminal import print_report, print_tasks

    if list_tasks:
        print_tasks(Console())
        return 0
    if target is None:
        raise UserError("name what to evaluate: a RUN or a PATH. `--list` shows the tasks.")
    writers = report_writers(options)
    report = (_evaluated_on_modal if options["backend"] == "modal" else _evaluated)(target, options)
    print_report(Console(), report)
    for write, path in writers:
        write(report, path)
        click.echo(f"Written: {path}", err=True)
    return 0


@dataclass(frozen=True)
class Plan:
    """What will be asked of which models; everything in it is checked."""

    models: list[ModelSource]
    tasks: list[Task]
    settings: AskSettings
    ks: tuple[int, ...]
    earlier: Report | None


def _evaluated(target: str, options: dict[str, Any]) -> Report:
    from ray_pipeline.evaluation.outcome import is_report

    if is_report(Path(target)):
        return _read(Path(target), options)
    plan = make_plan(target, options)
    reports = [_ask(plan, source) for source in plan.models]
    if not options["no_tracking"]:
        _track(reports)
    other = plan.earlier or (reports[1] if len(reports) > 1 else None)
    if other is not None:
        reports[0].compare(other)
    return reports[0]


def _evaluated_on_modal(run: str, options: dict[str, Any]) -> Report:
    """As `_evaluated`, of a run whose files are there; a comparison with a report, or with another run there."""
    from modal_gpu.evaluation import evaluate_there
    from ray_pipeline.evaluation.outcome import is_report, read_report

    sampling(options)  # refused before a container is rented
    levels(options["difficulty"])
    here = ("backend", "compare", "json_file", "html_file", "reports", "runs_dir")
    sent = {name: value for name, value in options.items() if name not in here}

    def ask(run: str) -> Report:
        with TemporaryDirectory() as folder:
            file = Path(folder, "report.json")
            file.write_text(evaluate_there(run, sent, report_values), encoding="utf-8")
            return read_report(file)

    other = Path(options["compare"] or "")
    earlier = read_report(other) if is_report(other) else None
    report = ask(run)
    if options["compare"] is not None:
        report.compare(earlier or ask(options["compare"]))
    return report


def report_values(run: str, options: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of one model as `--json` writes it."""
    return _evaluated(run, {**options, "compare": None}).as_json()


def _read(path: Path, options: dict[str, Any]) -> Report:
    """An earlier report, compared with another if asked."""
    from ray_pipeline.evaluation.outcome import is_report, read_report

    given = {"stage": None, "tools": None, "difficulty": None, "limit": None, "temperature": None, "ks": None,
             "max_new_tokens": None, "samples": 1, "seed": 0}  # fmt: skip
    for name, default in given.items():
        if options[name] != default:
            option = "k" if name == "ks" else name.replace("_", "-")
            raise UserError(f"--{option}: {path} is a report, its questions were asked already. Leave it out.")
    report = read_report(path)
    if options["tasks"] is not None:
        names = split_names(options["tasks"])
        there = {task.name: task for task in report.tasks}
        missing = [name for name in names if name not in there]
        if missing:
            raise UserError(f"--tasks {missing[0]}: {path} holds only {', '.join(there)}.")
        report.tasks = [there[name] for name in names]
    if options["compare"] is not None:
        other = Path(options["compare"])
        if not is_report(other):
            raise UserError(
                f"--compare {other}: {path} is a report, so the other one has to be a report (.json) too. To ask a "
                "model the same questions, name the model first: eval MODEL --tasks ... --compare REPORT.json"
            )
        report.compare(read_report(other))
    return report


def make_plan(target: str, options: dict[str, Any]) -> Plan:
    """Everything that can be refused before a model is loaded.

    Raises:
        UserError: naming the option.
    """
    from ray_pipeline.cli.eval_target import find_model
    from ray_pipeline.evaluation.asking import AskSettings
    from ray_pipeline.evaluation.outcome import check_comparable, is_report, read_report
    from ray_pipeline.evaluation.tasks import Request, make_tasks

    samples, temperature, ks = sampling(options)
    difficulties = levels(options["difficulty"])
    runs_dir = output_dir(options["runs_dir"])
    source = find_model(target, options["stage"], runs_dir)
    names = ["heldout"] if options["tasks"] is None and source.heldout else split_names(options["tasks"] or "")
    landlock = not options["without_landlock"]
    request = Request(None, options["seed"], options["limit"], difficulties, source.heldout, landlock)
    models, earlier, compare = [source], None, options["compare"]
    if compare is not None and is_report(Path(compare)):
        earlier = read_report(Path(compare))
    elif compare is not None:
        models.append(find_model(compare, None, runs_dir))
    tasks = make_tasks(names, request)
    if earlier is not None:
        check_comparable(tasks, earlier)
    for model in models:
        model.read_tokenizer()
    tools = source.tools
    if options["tools"] is not None:
        tools = tools.model_copy(update={"names": split_names(options["tools"])})
    if not landlock:
        tools = tools.model_copy(update={"without_landlock": True})
    if tools.names:
        from ray_pipeline.evaluation.asking import check_tools

        check_tools(tuple(tools.names), models, without_landlock=tools.without_landlock)
    limit = options["max_new_tokens"] or source.max_new_tokens or DEFAULT_NEW_TOKENS
    settings = AskSettings(samples, temperature, limit, options["seed"], options["max_batch"], tools)
    return Plan(models, tasks, settings, ks, earlier)


def _ask(plan: Plan, source: ModelSource) -> Report:
    """Load one model and ask it everything."""
    from ray_pipeline.cli.eval_progress import AskProgress
    from ray_pipeline.data.chat.completion_text import finite_logits
    from ray_pipeline.evaluation.evaluate import answers_wanted, evaluate
    from ray_pipeline.evaluation.models import load
    from ray_pipeline.evaluation.outcome import Report

    settings = plan.settings
    with AskProgress(source.name) as progress:
        progress.say("loading")
        model = load(source)
        results = []
        for task in plan.tasks:
            progress.start(task.name, answers_wanted(task, settings))
            with finite_logits(f"the model in {source.folder}", "Give another stage or folder, or train it again."):
                results.append(evaluate(model, task, settings, plan.ks, progress.add))
    about = {
        "name": source.name,
        "folder": str(source.folder),
        "form": source.form,
        "parameters": model.backend.parameters,
        "device": str(model.backend.device),
    }
    how = {
        "samples": settings.samples,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "tools": list(settings.tools.names),
    }
    return Report(about, how, results, time.time())


def _track(reports: list[Report]) -> None:
    """Tell the trackers of the models' runs; a folder that cannot be written costs that alone."""
    from ray_pipeline.dag.tracked_eval import track_evaluation

    for report in reports:
        try:
            name = track_evaluation(report)
        except (UserError, OSError) as error:
            click.echo(f"Warning: {report.model['name']}: trackers are not told ({error})", err=True)
            continue
        if name is not None:
            click.echo(f"Tracked as {name}", err=True)
