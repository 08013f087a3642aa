"""The flags that change settings, shared by the verbs that read them. A flag is a short name for a dotted key."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.dial import dialled
from ray_pipeline.errors import UserError
from ray_pipeline.settings.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from ray_pipeline.settings.schema import PipelineFields

# option name -> dotted keys it sets
FLAG_KEYS: dict[str, tuple[str, ...]] = {
    "model_size": ("model_size",),
    "gpus": ("layout.gpus",),
    "pp_size": ("layout.pp_size",),
    "dp_size": ("layout.dp_size",),
    "tp_size": ("layout.tp_size",),
    "ep_size": ("layout.ep_size",),
    "sp_size": ("layout.sp_size",),
    "zero_stage": ("layout.zero_stage",),
    "schedule": ("layout.schedule",),
    "pp_layout": ("layout.pp_layout",),
    "activation_checkpointing": ("layout.activation_checkpointing",),
    "offload_optimizer": ("layout.offload_optimizer",),
    "min_gpus": ("layout.min_gpus",),
    "batch_size": ("pretrain.batch_size", "sft.batch_size", "distillation.batch_size"),
    "seq_len": ("data.seq_len",),
    "seed": ("seed",),
    "run_name": ("run_name",),
    "output_dir": ("output_dir",),
    "backend": ("backend",),
    "wandb": ("tracking.wandb",),
    "log_level": ("tracking.log_level",),
    "budget_usd": ("cost.budget_usd",),
    "sft_data": ("data.sft",),
    "prompt_data": ("data.prompts",),
    "preference_data": ("data.preferences",),
    "init_from": ("init_from.path",),
    "gpu_type": ("modal.gpu_type",),
}
_SIZE_DEFAULTS: dict[str, int | None] = {
    "layout.gpus": None,
    "layout.pp_size": 1,
    "layout.dp_size": None,
    "layout.tp_size": 1,
    "layout.ep_size": 1,
    "layout.sp_size": 1,
}
# What was chosen for the sizes and means nothing for others.
_FOLLOWS_SIZES: dict[str, str | None] = {"layout.schedule": "1f1b", "layout.pp_layout": None, "layout.min_gpus": None}


@dataclass(frozen=True)
class Request:
    """What the command line asks of the settings.

    Attributes:
        overrides: dotted keys. max_steps: upper limit for every training stage.
        skip: stages to leave out of the run. dpo: whether DPO joins them.
    """

    config: Path | None
    overrides: dict[str, Any]
    max_steps: int | None
    skip: tuple[str, ...] = ()
    dpo: bool = False

    def load(self) -> PipelineFields:
        """The settings of a new run."""
        return self._load(self.config, self.overrides)

    def load_stored(self, run_dir: Path) -> PipelineFields:
        """The settings a run was started with, changed by what the command line gives.

        A size of the layout given now replaces the stored layout whole: `--gpus 2 --dp-size 2` on a run that was
        started with `--pp-size 3` means two ranks.
        """
        overrides = dict(self.overrides)
        if any(key in overrides for key in _SIZE_DEFAULTS):
            overrides = _SIZE_DEFAULTS | _FOLLOWS_SIZES | overrides
        overrides |= {"run_name": run_dir.name, "output_dir": str(run_dir.parent)}
        return self._load(run_dir / CONFIG_FILE, overrides)

    def _load(self, path: Path | None, overrides: dict[str, Any]) -> PipelineFields:
        from ray_pipeline.settings.loading import load_config

        return load_config(path, overrides, os.environ, max_steps=self.max_steps, skip=self.skip, dpo=self.dpo)


def grouped(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator, listed by `--help` in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


axis_options = grouped(
    click.option("--gpus", type=click.IntRange(1), help="Ranks. Default: every GPU there is, or one CPU rank."),
    click.option("--pp-size", type=click.IntRange(1), help="Pipeline stages the layers are split over."),
    click.option("--dp-size", type=click.IntRange(1), help="Replicas that read different rows."),
    click.option("--tp-size", type=click.IntRange(1), help="Ranks a matrix is split over."),
    click.option("--ep-size", type=click.IntRange(1), help="Ranks the experts are split over."),
    click.option("--sp-size", type=click.IntRange(1), help="Ranks a sequence is split over."),
    click.option(
        "--zero-stage", type=click.IntRange(0, 3), help="What replicas share: optimizer state, gradients, weights."
    ),
    click.option("--schedule", metavar="[1f1b|interleaved_1f1b|zbv|dualpipev]", help="Order of work in the pipeline."),
    click.option("--pp-layout", metavar="E+4|4|4+H", help="Layers of each pipeline part. Default: balanced by cost."),
    click.option(
        "--activation-checkpointing", metavar="[none|selective|full]", help="Compute again in backward, keep less."
    ),
    click.option("--offload-optimizer/--no-offload-optimizer", default=None, help="Optimizer state in CPU memory."),
    click.option("--min-gpus", type=click.IntRange(1), help="Elastic: go on with this many ranks if some are lost."),
)
layout_options = grouped(
    axis_options,
    click.option("--backend", metavar="[auto|cpu|cuda|modal]", help="Where to compute. auto: GPUs if there are any."),
    click.option("--gpu-type", help="With --backend modal: the GPU to rent, for example H100."),
    click.option("--wandb/--no-wandb", default=None, help="Weights & Biases (offline without an API key)."),
    click.option(
        "--log-level",
        envvar="RAY_PIPELINE_LOG",
        metavar="[debug|info|warning|error]",
        help="Least that a stage's logs hold; debug: seconds of every phase too. Or RAY_PIPELINE_LOG.",
    ),
    click.option("--budget-usd", type=float, help="Save and stop before more than this is spent; see cost."),
    click.option("--time-sliced", is_flag=True, hidden=True),
)
rent_options = grouped(
    click.option("--detach", is_flag=True, help="With --backend modal: leave once it has begun; see the verb modal."),
    click.option("--yes", is_flag=True, help="With --backend modal: do not ask before GPUs are rented."),
)
chain_options = grouped(
    click.option("--skip", multiple=True, metavar="STAGE", help="Leave this stage out of the run. May be repeated."),
    click.option("--dpo", is_flag=True, help="Train on preferences between SFT and GRPO."),
)
recipe_options = grouped(
    click.option("--config", type=click.Path(path_type=Path), help="Recipe: YAML file or shipped name. Default: tiny."),
    click.option("--model-size", metavar="[tiny|small|medium|large]", help="A preset for the architecture."),
    click.option(
        "--max-steps", type=click.IntRange(1, 10**8), help="Upper limit for the steps of every training stage."
    ),
    click.option("--batch-size", type=click.IntRange(1), help="Rows per step of PRETRAIN, SFT and DISTILLATION."),
    click.option("--seq-len", type=click.IntRange(2), help="Tokens per packed row."),
    click.option("--seed", type=click.IntRange(0), help="Decides data order, initial weights and sampling."),
    click.option("--data", multiple=True, help="Pretraining text: file, folder, glob or datasets name. Repeat to mix."),
    click.option("--sft-data", help="Conversations for SFT: file, folder, glob or datasets name[:prompt=COLUMN,...]."),
    click.option("--prompt-data", help="Questions with answers for GRPO and evaluation, the same forms."),
    click.option("--preference-data", help="Chosen and rejected answers for DPO, the same forms."),
    click.option("--init-from", metavar="PATH", help="Start from this model folder; it decides `model`. See --skip."),
    click.option("--include", multiple=True, help="With --init-from: take these tensors alone (glob or beginning)."),
    click.option("--exclude", multiple=True, help="With --init-from: leave these tensors; they start fresh."),
    click.option("--allow-missing", multiple=True, help="With --init-from: these tensors may be absent."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting: --set grpo.beta=0.02."),
    chain_options,
)
dial_options = grouped(
    click.option(
        "--compute", type=click.FloatRange(1.0, 1e30), help="FLOPs of PRETRAIN: decide size, steps and rates."
    ),
    click.option("--minutes", type=click.FloatRange(0.01, 1e6), help="The same by this machine's speed; see --law."),
    click.option(
        "--law", metavar="NAME|FILE", help="How the loss falls (scripts/fit_law.py). Default: tinyshakespeare."
    ),
)
place_options = grouped(
    click.option("--run-name", help="Name of the run and its folder. Default: recipe and a hash of the settings."),
    click.option("--output-dir", help="Folder of all runs. Default: runs."),
)
stage_options = grouped(
    click.option("--stage", help="Only this stage; it runs again even where it is finished."),
    click.option("--from", "from_", help="This stage and those after it."),
    click.option("--until", help="The stages up to this one."),
    click.option("--dry-run", is_flag=True, help="Print the plan and stop."),
)


def check_temperature(value: float) -> None:
    """Raise UserError for a temperature that logits cannot be divided by; 0 is greedy."""
    if not math.isfinite(value):
        raise UserError(f"--temperature {value}: must be a finite number.")
    if value and not 1e-3 <= value <= 1e3:
        raise UserError(f"--temperature {value:g}: must be 0, which is greedy, or from 0.001 to 1000.")


def take_request(options: dict[str, Any]) -> Request:
    """Collect the flags into a request. `--set` outranks the flags.

    Raises:
        UserError: for a `--set` without "=", and for --time-sliced.
    """
    if options.get("time_sliced"):
        raise UserError(
            "--time-sliced: ranks run side by side here, as CPU processes where there are no GPUs; "
            "use --gpus 3 --pp-size 3 instead."
        )
    overrides: dict[str, Any] = dialled(options)
    for option, keys in FLAG_KEYS.items():
        if options.get(option) is not None:
            overrides |= dict.fromkeys(keys, options[option])
    if options.get("data"):
        overrides["data.pretrain"] = [{"name": name} for name in options["data"]]
    for option in ("include", "exclude", "allow_missing"):
        if options.get(option):
            overrides[f"init_from.{option}"] = list(options[option])
    overrides |= parse_settings(options.get("settings") or ())
    return Request(
        options.get("config"), overrides, options.get("max_steps"), options.get("skip") or (), bool(options.get("dpo"))
    )


def parse_settings(settings: tuple[str, ...]) -> dict[str, str]:
    """`("grpo.beta=0.02",)` -> `{"grpo.beta": "0.02"}`."""
    out = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {setting}: write it as key=value, for example --set grpo.beta=0.02.")
        out[key.strip()] = value
    return out
