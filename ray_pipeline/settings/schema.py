"""Every setting of a run, with its meaning. No torch, no Ray: a dry run must be cheap.

This file is the schema alone; `loading` reads YAML, environment and flags into it and explains what is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model.config import ModelConfig
from model.convert.export_kinds import GgufKind, HfKind
from ray_pipeline.settings.guards_config import GuardsConfig
from ray_pipeline.settings.layout_config import LayoutConfig
from ray_pipeline.settings.post_training import (
    DistillationConfig,
    DpoConfig,
    EvaluationConfig,
    GrpoConfig,
    LoraConfig,
    RolloutConfig,
    ScoringConfig,
    SftConfig,
    StudentConfig,
    ToolsConfig,
)
from ray_pipeline.settings.section import (
    MOST_SEED,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    Section,
    Tokens,
    TrainingConfig,
)

__all__ = [
    "STAGES",
    "TRAINING_STAGES",
    "CostConfig",
    "DataConfig",
    "DistillationConfig",
    "DpoConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GrpoConfig",
    "GuardsConfig",
    "InitFromConfig",
    "LayoutConfig",
    "LoraConfig",
    "ModalConfig",
    "OptimizerConfig",
    "PipelineFields",
    "PretrainConfig",
    "RolloutConfig",
    "ScoringConfig",
    "Section",
    "SftConfig",
    "SourceConfig",
    "StudentConfig",
    "TokenizerConfig",
    "ToolsConfig",
    "TrackingConfig",
    "TrainingConfig",
]

STAGES = ("data_prep", "pretrain", "sft", "dpo", "grpo", "distillation", "export")
TRAINING_STAGES = ("pretrain", "sft", "dpo", "grpo", "distillation")
StageName = Literal["data_prep", "pretrain", "sft", "dpo", "grpo", "distillation", "export"]


class SourceConfig(Section):
    """One source of documents in a mixture."""

    name: str = Field(
        description="builtin, builtin_dialogues (questions, most answered at once), a path (.txt, .json, .jsonl, .csv, "
        ".parquet, .arrow; .gz and .zst as well), a folder or glob of shards, or a datasets "
        'name "org/name[:split[:column]]"; ":text=story" at the end names the column'
    )
    weight: PositiveFloat | None = Field(
        None, description="share of the bytes, in any unit; without weights every source is used whole, once"
    )
    licence: str = Field("unknown", description="recorded in the shard manifest")


class DataConfig(Section):
    """What the model reads. `pretrain` may mix sources; SFT and prompts take one each."""

    pretrain: list[SourceConfig] = Field(default_factory=lambda: [SourceConfig(name="builtin", licence="Apache-2.0")])
    sft: str = Field(
        "builtin",
        description="conversations: builtin, builtin_chat (with small talk), builtin_tools (a calculator), "
        'builtin_no_tools (the same without), path or datasets name; ":prompt=question,response=answer" at its end '
        "names the columns",
    )
    prompts: str = Field(
        "builtin",
        description="questions with answers for GRPO and evaluation: builtin, builtin_chat, builtin_tools, path, "
        'datasets name, or "reasoning_gym:task[:size]"',
    )
    preferences: str = Field("builtin", description="pairs of a chosen and a rejected answer for DPO, same forms")
    seq_len: Tokens = Field(256, description="tokens per packed row")
    builtin_documents: PositiveInt = Field(20000, description="documents the built-in text generator writes")
    builtin_conversations: PositiveInt = 20000
    builtin_prompts: PositiveInt = 4000
    validation_fraction: Fraction = Field(0.02, description="share of documents held out, chosen by document hash")
    heldout_questions: PositiveInt = Field(400, description="questions kept for evaluation alone")
    decontaminate_ngram: PositiveInt = Field(
        12, description="a document sharing this many words in a row with an evaluation question is dropped"
    )
    max_documents: PositiveInt | None = Field(None, description="read at most this many documents of each source")
    on_bad_record: Literal["fail", "skip"] = Field(
        "fail", description="skip: records that cannot be used are left out, counted and listed"
    )
    max_bad_records: Fraction = Field(0.05, description="share of a source's records that may be left out so")
    max_epochs: float = Field(
        4.0,
        ge=1.0,
        le=1000.0,
        description="times a source scarce for its weight is used at most; beyond it others are left out in part",
    )
    text_documents: Literal["auto", "file", "paragraphs", "lines"] = Field(
        "auto",
        description="what is a document of a .txt file: all of it, paragraphs merged up to text_characters, or a line; "
        "auto: what stands between separators where there are any, else paragraphs",
    )
    text_separator: str | None = Field(
        "<|endoftext|>", min_length=1, description="ends a document of a .txt file; null: nothing does"
    )
    text_characters: PositiveInt | None = Field(
        None, description="characters that paragraphs are merged up to; default: those of a row, 2000 at least"
    )
    tokens_per_shard: PositiveInt = 16_000_000


class TokenizerConfig(Section):
    """`train` makes a byte-level BPE of `vocab_size` from the pretraining text; else a folder or hub name is loaded."""

    name: str = "train"
    vocab_size: PositiveInt = 512
    tools: bool = Field(False, description="train: with the tokens and the chat template of tool calls")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="a .jinja file, or one of the tokenizer's templates by name (a trained one's: default, and plain, "
        "which writes turns in words); default: its own",
    )


class InitFromConfig(Section):
    """Weights that PRETRAIN starts from: a published DeepSeek-V2, V3 or V3.2 folder, or one that EXPORT wrote."""

    path: str | None = Field(None, description="folder with config.json, safetensors, tokenizer; it decides `model`")
    include: list[str] = Field(default_factory=list, description="tensors to take, globs or beginnings; empty: all")
    exclude: list[str] = Field(default_factory=list, description="tensors to leave; they start fresh")
    allow_missing: list[str] = Field(default_factory=list, description="tensors that may be absent; they start fresh")
    max_vocab_size: PositiveInt = Field(1_000_000, description="a larger vocabulary is refused")
    max_file_bytes: PositiveInt = Field(100_000_000_000, description="a larger weight file is refused")


class PredictionConfig(Section):
    """What a law of scaling expects of PRETRAIN; `--compute` and `--minutes` write it. It changes no weight."""

    loss: PositiveFloat = Field(description="validation loss in nats a token")
    text: str = Field(description="what the law was fitted on")
    validation: str = Field(description="sha256 of its held-out tokens; a run with others is not held against it")


class PretrainConfig(TrainingConfig):
    """Next-token cross-entropy plus multi-token prediction."""

    mtp_loss_weight: NonNegativeFloat = 0.3
    indexer_warmup_steps: NonNegativeInt | None = Field(
        None,
        description="model.attention=dsa: steps of dense attention that the indexer learns from; default: a fifth, or "
        "none with init_from",
    )
    prediction: PredictionConfig | None = Field(None, description="of the validation loss, by a law of scaling")


class ExportConfig(Section):
    """What is written at the end and how it is checked."""

    source: Literal["pretrain", "sft", "dpo", "grpo", "distillation"] | None = Field(
        None, description="whose weights are exported; default: the last before distillation, the student beside it"
    )
    gguf: list[GgufKind] = Field(["f32", "f16", "q8_0"], description="kinds of GGUF file")
    dtype: HfKind = Field("float32", description="of the Hugging Face folder; fp8: blocks as DeepSeek publishes them")
    max_shard_bytes: PositiveInt = Field(
        5_000_000_000, description="of one weight file of the folder; larger weights are several, with an index"
    )
    licence: str = Field("apache-2.0", description="of the exported weights, written into the model card and GGUF")


class TrackingConfig(Section):
    """Where figures go besides metrics.jsonl in the stage's folder, which is always written; several at once."""

    wandb: bool = Field(True, description="Weights & Biases; offline where there is no API key")
    trackio: bool = Field(False, description="a local database, or the Space that TRACKIO_SPACE_ID names")
    tensorboard: bool = Field(False, description="event files in tensorboard/ of each stage's folder")
    mlflow: bool = Field(False, description="MLFLOW_TRACKING_URI, or mlruns/ beside the runs")
    project: str = "deepseek-from-scratch"
    entity: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least that logs/*.jsonl of a stage hold; debug: the seconds of each phase of each step too"
    )


class CostConfig(Section):
    """What a GPU costs, and how much may be spent."""

    usd_per_gpu_hour: PositiveFloat | None = Field(
        None,
        description="of one's own cluster or contract; default: Modal's list price with --backend modal, else none",
    )
    whole_run: bool = Field(
        False, description="GPUs are paid for in every stage, not where ranks train alone: a machine rented whole"
    )
    budget_usd: PositiveFloat | None = Field(
        None, description="of the whole run: told at 50, 75 and 90%; at 99% it saves and stops"
    )


class ModalConfig(Section):
    """Where `--backend modal` runs."""

    gpu_type: str = Field("H100", description="several with commas are tried in that order; CPU: ranks without one")
    timeout_seconds: Annotated[int, Field(gt=0, le=30 * 86400)] = Field(
        86400, description="of the whole run; beyond a day Modal's functions are begun again and resume"
    )
    volume: str = "deepseek-runs"
    hf_cache_volume: str = "huggingface-cache"
    wandb_secret: str = Field("wandb", description="Modal's secret with WANDB_API_KEY, where it is not set here")
    hf_secret: str | None = Field(None, description="Modal's secret with HF_TOKEN, where it is not set here")
    region: str | None = Field(None, description='for example "us-east", several with commas; costs more')
    nonpreemptible: bool = Field(
        False, description="containers without GPUs are not taken away, at three times the price; with GPUs all may be"
    )
    cpus: PositiveFloat | None = Field(None, description="cores of a container that trains; default: two a GPU")
    memory_gib: PositiveFloat | None = Field(None, description="of it; default: what `plan` says")
    local_modules: list[str] = Field(
        default_factory=list, description="Python packages that go along, beside those named as module:function"
    )


class PipelineFields(Section):
    """One run, whole. `PipelineConfig` in `loading` adds the sources it is read from."""

    recipe: str = "tiny"
    run_name: str | None = Field(None, description="default: the recipe's name and a hash of what decides the result")
    output_dir: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    backend: Literal["auto", "cpu", "cuda", "modal"] = "auto"
    model_size: Literal["tiny", "small", "medium", "large"] | None = Field(
        None, description="a preset for `model`; keys given there win"
    )
    stages: list[StageName] = Field(
        ["data_prep", "pretrain", "sft", "grpo", "distillation", "export"],
        description="those of the run; dpo is optional, and pretrain can be left out with init_from",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    layout: LayoutConfig = Field(default_factory=LayoutConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    init_from: InitFromConfig = Field(default_factory=InitFromConfig)
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    dpo: DpoConfig = Field(default_factory=DpoConfig)
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    cost: CostConfig = Field(default_factory=CostConfig)
    modal: ModalConfig = Field(default_factory=ModalConfig)

    def dense_steps(self, stage: str) -> int:
        """Steps at a stage's beginning in which sparse attention reads everything, for its indexer to learn from.

        A fifth of PRETRAIN by default: before attention has settled on what it reads, there is nothing to learn. V3.2
        took 0.2% of its tokens (arXiv:2512.02556, §2.1.1), but of a model that was trained already. Weights that are
        given come with a trained indexer.
        """
        given = self.pretrain.indexer_warmup_steps
        if stage != "pretrain":
            return 0
        if given is not None:
            return given
        return 0 if self.init_from.path is not None else self.pretrain.steps // 5
