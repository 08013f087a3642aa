"""How the loss falls with parameters and tokens, fitted to trainings, and the model that a budget is best spent on.

    loss(N, D) = floor + size * N^-size_exponent + data * D^-data_exponent        (arXiv:2203.15556, eq. 2)

N counts the weights that a token passes through, without embedding and head; D counts tokens. Rates and initial weights
keep their meaning over widths (`settings_of`), so that one law holds for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from model.config import ModelConfig
from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.settings.layers import RECIPE_DIR
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.presets import PRESETS

LAW_DIR = RECIPE_DIR / "laws"
REFERENCE = 128  # the width whose rates the tiny recipe states
WIDTH_STEP = 16
BEYOND = 2  # times the widest model that a law was fitted on; further out it is a guess
FEWEST_STEPS = 50
MUON_STAGES = ("pretrain", "sft", "distillation")


@dataclass(frozen=True)
class Curve:
    """The five numbers of a law; losses in nats a token."""

    floor: float
    size: float
    size_exponent: float
    data: float
    data_exponent: float

    def loss(self, params: float, tokens: float) -> float:
        """Predicted validation loss."""
        return float(self.floor + self.size * params**-self.size_exponent + self.data * tokens**-self.data_exponent)


@dataclass(frozen=True)
class ScalingLaw:
    """A curve and what it was fitted on.

    Attributes:
        text: what the models read, for a person. validation: sha256 of the held-out tokens, by which a run knows
            whether it reads the same.
        batch_size: rows of a step. widths: of the models that were trained.
        error: the largest relative difference between the curve and those trainings.
    """

    text: str
    validation: str
    vocab_size: int
    seq_len: int
    batch_size: int
    widths: tuple[int, ...]
    curve: Curve
    error: float

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Choice:
    """What a budget is spent on.

    Attributes:
        flops: of the whole training. loss: predicted, in nats a token.
    """

    width: int
    steps: int
    flops: float
    loss: float


def model_of(width: int, *, vocab_size: int, seq_len: int) -> ModelConfig:
    """The model of this width as the dial builds it."""
    return ModelConfig(vocab_size=vocab_size, max_position_embeddings=max(512, seq_len), **_shape(width))


def _shape(width: int) -> dict[str, Any]:
    """The tiny preset's shape at another width: all widths and ranks in proportion, heads of the same size."""
    tiny = PRESETS["tiny"]
    scaled = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "q_lora_rank",
              "kv_lora_rank")  # fmt: skip
    return tiny | {key: tiny[key] * width // REFERENCE for key in scaled}


def settings_of(width: int, steps: int) -> dict[str, Any]:
    """Dotted settings of the tiny recipe for another width and length.

    An orthogonalised step should grow with a matrix's width as its weights' effect does (arXiv:2310.17813): Muon here
    scales it by the root of the width, so the rate falls by that root. The embedding's steps and the norms' stay as
    large as they were, the head's fall with the width (arXiv:2203.03466, table 8).
    """
    recipe, root = load_config(None), math.sqrt(width / REFERENCE)
    out: dict[str, Any] = {f"model.{key}": value for key, value in _shape(width).items()}
    for stage in MUON_STAGES:
        own = getattr(recipe, stage).optimizer
        scaled = {
            "lr": own.lr / root, "embedding_lr_factor": own.embedding_lr_factor * root,
            "head_lr_factor": own.head_lr_factor / root, "vector_lr_factor": own.vector_lr_factor * root,
        }  # fmt: skip
        out |= {f"{stage}.optimizer.{key}": float(f"{value:.4g}") for key, value in scaled.items()}
    out["grpo.optimizer.lr"] = float(
        f"{recipe.grpo.optimizer.lr / root**2:.4g}"
    )  # AdamW's steps of a matrix fall with its width
    # At most half of the teacher, of which embedding and head are the larger part the narrower it is.
    layers = 4 if width >= REFERENCE else 3
    student = {"num_hidden_layers": layers, "moe_intermediate_size": width // 4, "intermediate_size": width}
    out |= {f"distillation.student.{key}": value for key, value in student.items()}
    return out | {"pretrain.steps": steps}


def params_of(model: ModelConfig) -> int:
    """N of the law."""
    return model.num_params(active=True, mtp=False) - 2 * model.vocab_size * model.hidden_size


def choose(law: ScalingLaw, flops: float) -> Choice:
    """The width and steps of the lowest predicted loss at this many floating-point operations.

    Raises:
        UserError: too few for the smallest model, or more than the law reaches.
    """
    least, most = min(law.widths), BEYOND * max(law.widths)
    choices = []
    for width in range(least, most + 1, WIDTH_STEP):
        model = model_of(width, vocab_size=law.vocab_size, seq_len=law.seq_len)
        step = model.flops_per_token(law.seq_len) * law.tokens_per_step
        steps = round(flops / step)
        if steps >= FEWEST_STEPS:
            loss = law.curve.loss(params_of(model), steps * law.tokens_per_step)
            choices.append(Choice(width, steps, float(steps * step), loss))
    if not choices:
        smallest = model_of(least, vocab_size=law.vocab_size, seq_len=law.seq_len)
        needed = FEWEST_STEPS * smallest.flops_per_token(law.seq_len) * law.tokens_per_step
        raise UserError(
            f"--compute {flops:.3g}: {FEWEST_STEPS} steps of the smallest model of the law, {least} wide, take "
            f"{needed:.2g}. Give at least that, or train without --compute."
        )
    best = min(choices, key=lambda choice: choice.loss)
    if best.width == most:
        raise UserError(
            f"--compute {flops:.3g}: best spent on a model of {most} features or more, and the law was fitted on "
            f"{least} to {max(law.widths)}. Fit one on wider models (scripts/fit_law.py), or choose a size yourself "
            "with --model-size."
        )
    return best


def read_law(name: str) -> ScalingLaw:
    """A law by its file or the name of a shipped one.

    Raises:
        UserError: there is none, or the file holds something else.
    """
    path = Path(name) if Path(name).is_file() else LAW_DIR / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in LAW_DIR.glob("*.yaml"))
        raise UserError(f"--law {name}: no such law or file{did_you_mean(name, known)}. There are: {', '.join(known)}.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return ScalingLaw(**found | {"curve": Curve(**found["curve"]), "widths": tuple(found["widths"])})
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"--law {path}: not a law as scripts/fit_law.py writes it ({error}).") from None


def law_text(law: ScalingLaw) -> str:
    """YAML that `read_law` reads."""
    return yaml.safe_dump(asdict(law) | {"widths": list(law.widths)}, sort_keys=False)


def fit(points: Sequence[tuple[float, float, float]]) -> tuple[Curve, float]:
    """The curve through trainings (N, D, loss), and its largest relative error.

    As in arXiv:2203.15556, §D.2: Huber's loss between logarithms, from many starts; the best end is taken.

    Raises:
        ValueError: fewer trainings than the curve has numbers.
    """
    import numpy as np
    from scipy.optimize import minimize

    if len(points) < 5:
        raise ValueError(f"{len(points)} trainings: five numbers cannot be fitted to them")
    params, tokens, losses = (np.log(np.array(column)) for column in zip(*points, strict=True))

    def terms(x: Any) -> Any:
        parts = [np.full_like(params, x[0]), x[1] - x[2] * params, x[3] - x[4] * tokens]
        return np.logaddexp.reduce(parts)

    def objective(x: Any) -> float:
        error = np.abs(terms(x) - losses)
        return float(np.where(error < 1e-3, error**2 / 2, 1e-3 * (error - 5e-4)).sum())

    starts = [(e, a, alpha, b, beta) for e in (-1.0, 0.5) for a in (0.0, 4.0) for alpha in (0.2, 0.6)
              for b in (0.0, 5.0) for beta in (0.2, 0.6)]  # fmt: skip
    bounds = [(-5, 2), (-5, 25), (0.01, 2), (-5, 25), (0.01, 2)]
    ends = [minimize(objective, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    x = min(ends, key=lambda end: end.fun).x
    error = float(np.abs(np.expm1(terms(x) - losses)).max())
    curve = Curve(math.exp(x[0]), math.exp(x[1]), float(x[2]), math.exp(x[3]), float(x[4]))
    return curve, error
