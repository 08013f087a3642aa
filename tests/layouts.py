"""Settings and layouts for tests: any layout, legal or not."""

from __future__ import annotations

from hypothesis import strategies as st

from ray_pipeline.layout.layout import Layout, layout_of
from ray_pipeline.settings.schema import PipelineFields

# The student is as deep as the model, for layouts with more than three parts.
SIX_LAYERS = {"distillation.student.num_hidden_layers": 6}
WANTED = st.builds(
    Layout,
    gpus=st.integers(1, 16),
    pp=st.integers(1, 12),
    dp=st.integers(1, 12),
    tp=st.integers(1, 9),
    ep=st.integers(1, 9),
    sp=st.integers(1, 9),
    zero_stage=st.integers(0, 3),
    schedule=st.sampled_from(["1f1b", "interleaved_1f1b", "zbv", "dualpipev"]),
    pp_layout=st.sampled_from([None, "3|3", "E+2|2|2+H", "1|1|1|3", "x"]),
    offload_optimizer=st.booleans(),
    min_gpus=st.none() | st.integers(1, 16),
)


def recipe(**settings: int | str | bool) -> PipelineFields:
    """The defaults with settings of the layout (`pp_size`) or any others (`data.seq_len`)."""
    given = {key if "." in key else f"layout.{key}": value for key, value in settings.items()}
    return PipelineFields.model_validate(nested(given))


def nested(settings: dict) -> dict:
    out: dict = {}
    for key, value in settings.items():
        *groups, leaf = key.split(".")
        inner = out
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return out


def asked_for(settings: PipelineFields) -> Layout:
    """What the settings say, legal or not, with the open sizes filled in as the resolver does."""
    return layout_of(settings.layout)
