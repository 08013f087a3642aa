"""What a verification says: step by step for one layout, a table for many. Results in, text out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.records.units import seconds_text
from ray_pipeline.report.progress_lines import PLAIN_EVERY, ProgressLines
from ray_pipeline.verification.cases import Case, Tolerance, default_steps
from ray_pipeline.verification.compare import Result

EXAMPLES = 3  # refused layouts shown per rule


def say(console: Console, text: str, style: str = "") -> None:
    """One line, as it is: no markup, no wrapping."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def heading(cases: Sequence[Case]) -> str:
    """What is trained, and where."""
    subject, layout = cases[0].subject, cases[0].layout
    stages = dict.fromkeys(case.stage for case in cases)
    rows = sorted({case.subject.rows for case in cases})
    many = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else str(rows[0])
    where = f"{layout.gpus} {'GPU' if layout.device == 'cuda' else 'CPU'} rank{'s' if layout.gpus > 1 else ''}"
    layers = sorted({case.subject.model.num_hidden_layers for case in cases})
    depth = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])
    model = subject.model
    return (
        f"{where} over {'NCCL' if layout.device == 'cuda' else 'gloo'} against one process: {depth} layers, width "
        f"{model.hidden_size}, {model.n_routed_experts} experts, {model.num_nextn_predict_layers} MTP module(s); "
        f"{subject.steps} steps of {many} rows of {subject.seq_len} tokens with empty ends; {', '.join(stages)}"
    )


def print_steps(console: Console, result: Result, tolerance: Tolerance) -> None:
    """Losses and gradient norms side by side, the largest differences, the verdict."""
    compared = result.comparison
    if compared is not None:
        table = Table(title=result.case.name(), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for name in ("step", "loss\n1 process", "\nlayout", "\napart", "grad norm\n1 process", "\nlayout", "\napart"):
            table.add_column(name, justify="right", no_wrap=True)
        for step, (a, b) in enumerate(compared.losses):
            row = [f"{a:.7f}", f"{b:.7f}", _apart(a, b)]
            if step < len(compared.norms):
                one, other = compared.norms[step]
                table.add_row(str(step + 1), *row, f"{one:.6f}", f"{other:.6f}", _apart(one, other))
            else:
                table.add_row("eval", *row)
        console.print(table)
        say(console, f"largest loss difference         {compared.loss:.1e} relative, {tolerance.loss:g} allowed")
        say(console, f"largest grad norm difference    {compared.norm:.1e} relative, {tolerance.norm:g} allowed")
        allowed = "" if tolerance.weights is None else f", {tolerance.weights:g} allowed"
        where = f" in {compared.weight}" if compared.weight else ""
        say(console, f"largest weight difference       {compared.weights:.1e}{where}{allowed}")
        loads = f"{compared.misrouted} of {compared.routed}" if compared.misrouted else f"none of {compared.routed}"
        say(console, f"tokens with another expert      {loads}")
        margin = f"{compared.margin:.1e}" if math.isfinite(compared.margin) else "none"
        say(console, f"least margin of a choice        {margin}, seed {compared.seed}")
    print_verdict(console, result)


def print_verdict(console: Console, result: Result) -> None:
    """`PASS pp=2 fp32 adamw (3 s)`, or FAIL with what is wrong and how to see it again."""
    if result.passed:
        say(console, f"PASS {result.case.name()} ({seconds_text(result.seconds)})", "green")
        return
    say(console, f"FAIL {result.case.name()} ({seconds_text(result.seconds)})", "bold red")
    for line in [result.error, *result.wrong]:
        if line:
            say(console, f"  {line}", "red")
    say(console, f"  again: {rerun_command(result)}")


def rerun_command(result: Result) -> str:
    """The command that verifies this one layout."""
    case = result.case
    extra = [f"--precision {case.precision}"] if case.precision != "fp32" else []
    extra += [f"--optimizer {case.optimizer}"] if case.optimizer != "adamw" else []
    extra += [f"--stage {case.stage}"] if case.stage != "pretrain" else []
    extra += [f"--steps {case.subject.steps}"] if case.subject.steps != default_steps([case.stage]) else []
    return " ".join(["verify-parallel", case.layout.flags(), *extra])


def _apart(a: float, b: float) -> str:
    if not (math.isfinite(a) and math.isfinite(b)):
        return "not finite"
    return f"{abs(a - b) / max(abs(a), 1e-12):.1e}"


def print_table(console: Console, results: Sequence[Result]) -> None:
    """One line per layout: largest differences of loss, gradient norm and weights, tokens with another expert."""
    kinds = dict.fromkeys(result.case.kind() for result in results)
    for kind in kinds:
        table = Table(title=" ".join(kind), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        table.add_column("layout", min_width=20)
        for name in ("loss", "norm", "weights", "rerouted", "seconds", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for result in results:
            if result.case.kind() == kind:
                table.add_row(*_row(result))
        console.print(table)


def _row(result: Result) -> list[str | Text]:
    compared = result.comparison
    figures = ["", "", "", ""]
    if compared is not None:
        figures = [f"{value:.1e}" for value in (compared.loss, compared.norm, compared.weights)]
        figures.append(str(compared.misrouted))
    verdict = Text("PASS", style="green") if result.passed else Text("FAIL", style="bold red")
    return [result.case.layout.axes() or "one rank", *figures, f"{result.seconds:.1f}", verdict]


def print_refused(console: Console, refused: Mapping[str, Sequence[tuple[Layout, Refusal]]]) -> None:
    """Rules with the number of layouts each refuses, and some of them with the reason."""
    if not refused:
        return
    total = sum(len(found) for found in refused.values())
    say(console, f"Refused by the table of rules: {total} layouts", "bold")
    for rule, found in refused.items():
        say(console, f"  {rule}: {len(found)}")
        reasons: dict[str, Layout] = {}
        for layout, refusal in found:
            reasons.setdefault(str(refusal), layout)
        for reason, layout in list(reasons.items())[:EXAMPLES]:
            say(console, f"    {layout.axes()}: {reason}", "dim")
        if len(reasons) > EXAMPLES:
            say(console, f"    and {len(reasons) - EXAMPLES} more like these", "dim")


def print_summary(console: Console, results: Sequence[Result], total: int, seconds: float) -> None:
    """Every FAIL once more with its reason, then how many of `total` layouts passed."""
    failed = [result for result in results if not result.passed]
    for result in failed:
        print_verdict(console, result)
    unfinished = total - len(results)
    verdict = f"{len(failed)} FAIL" if failed else "STOPPED" if unfinished else "PASS"
    skipped = f", {unfinished} not verified" if unfinished else ""
    say(
        console,
        f"{verdict}: {len(results) - len(failed)} of {total} pass{skipped} ({seconds_text(seconds)})",
        "bold red" if failed else "bold yellow" if unfinished else "bold green",
    )


class Tally:
    """Progress over many layouts: done, rate, time left. `with Tally(console, total) as tally: tally.add(result)`"""

    def __init__(self, console: Console, total: int, *, before: int = 0, plain_every: float = PLAIN_EVERY):
        self.total, self.before, self.done, self.failed = total, before, before, 0
        self.lines = ProgressLines(console, plain_every=plain_every, transient=True)
        self._start = time.monotonic()

    def __enter__(self) -> Tally:
        self.lines.__enter__()
        self.lines.start("layouts", f"{self.total} to verify", self.total)
        return self

    def __exit__(self, *exc: object) -> None:
        self.lines.__exit__(*exc)

    def add(self, result: Result) -> None:
        """One more layout is done; a FAIL is shown at once."""
        self.done += 1
        if not result.passed:
            self.failed += 1
            print_verdict(self.lines.console, result)
        text = f"{self.text()}  {result.case.name()}"
        self.lines.show("layouts", text, self.done, now=self.done == self.total)

    def text(self) -> str:
        """`12/310  0.31/s  15 min 50 s left  0 FAIL`"""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self.before) / seconds
        left = f"  {seconds_text((self.total - self.done) / rate)} left" if rate else ""
        return f"{self.done}/{self.total}  {rate:.2f}/s{left}  {self.failed} FAIL"
