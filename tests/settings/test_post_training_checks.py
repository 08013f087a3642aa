"""Settings of SFT, DPO, GRPO and DISTILLATION that contradict each other, or that would change nothing."""

from __future__ import annotations

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.settings.loading import load_config

TOP_K = {
    "distillation.teacher": "topk:x", "distillation.teacher_answers": 0, "distillation.init": "random",
    "distillation.on_policy": 0, "distillation.conversations": "true",
}  # fmt: skip
STALE = {"grpo.rollout.max_staleness": 1, "grpo.rollout.workers": 1}
SHARDED = {"layout.sampling": "sharded", "layout.pp_size": 2}
TOKENS = {"distillation.loss": "cross_entropy", "distillation.on_policy": 0}


def d(**settings: object) -> dict[str, object]:
    return {f"distillation.{key}": value for key, value in settings.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft.lora.alpha": 32}, r"sft\.lora\.alpha=32\.0: has no effect, because sft\.lora\.r=0 trains every weight"),
        ({"sft.lora.target_modules": "[q_proj]"}, r"sft\.lora\.target_modules=\['q_proj'\]: has no effect"),
        ({"stages": "[data_prep, pretrain, dpo]", "dpo.loss_type": "ipo", "dpo.label_smoothing": 0.1}, "dpo.label_smo"),
        ({"grpo.beta": 0, "grpo.refresh_reference_every": 5}, "grpo.beta=0 drops the reference"),
        ({"grpo.overlong_penalty": 2}, "grpo.overlong_buffer=0 leaves it no room"),
        ({"grpo.overlong_buffer": 80}, "the penalty would begin before the first of max_new_tokens=80 tokens"),
        ({"grpo.rewards": "{}"}, "nothing would be rewarded"),
        ({"grpo.rewards": "{answer: 0.0}"}, "nothing would be rewarded"),
        ({"grpo.rollout.max_staleness": 1}, r"cannot train meanwhile\. Use --set grpo\.rollout\.workers=1"),
        ({"grpo.rollout.engine": "vllm"}, "engine=vllm: not offered.* can corrupt its experts.* Use engine=native"),
        ({**SHARDED, "grpo.rollout.workers": 1}, r"layout\.sampling=sharded: grpo\.rollout\.workers=1: .* whole model"),
        ({**SHARDED, "tools.names": "[calculator]"}, "every rank of a replica would call them.* Leave out the tools"),
        ({**SHARDED, "grpo.speculative": "true"}, "grpo.speculative=true with pp_size=2 and ep_size=1.* Leave it out"),
        ({"grpo.loss_type": "bnpo"}, "over the tokens of each micro-batch.* Use dapo"),
        ({"grpo.updates_per_rollout": 5, "grpo.num_iterations": 3}, r"updates_per_rollout=5 x num_iterations=3.* 15\."),
        ({"grpo.updates_per_rollout": 999, "grpo.checkpoint_every": 999}, r"= 256 answers into mini.* at most 256"),
        ({"grpo.beta": 0, "grpo.unbiased_kl": "false"}, "grpo.beta=0 drops the reference"),
        ({"grpo.sampler_correction": "none", "grpo.correction_max": 2}, "sampler_correction=none weighs nothing"),
        ({"grpo.sampler_correction": "none", **STALE}, "would train without a correction. Use sequence_mask"),
        ({"grpo.sampler_correction": "token_truncate", "grpo.correction_max": "none"}, "has no bound to truncate at"),
        ({"grpo.correction_min": 4}, r"correction_min=4: must be below correction_max=3\."),
        ({"grpo.recompute_logprobs": "false", "grpo.correction_max": 2}, "takes the sampler's log-probabilities for"),
        ({"grpo.recompute_logprobs": "false", **STALE}, "would train without a correction. Leave out either"),
        ({"tools.max_calls": 2}, r"tools\.names=\[\] offers no tool"),
        ({"tools.names": "[calculator]"}, "the trained tokenizer has no tokens for calls"),
        (d(jsd_beta=0.1), "distillation.loss=forward_kl is not jsd"),
        (d(hidden_weight=2), "distillation.loss=forward_kl compares no hidden states"),
        (d(prompts_per_step=4, on_policy=0), "distillation.on_policy=0 lets the student answer nothing"),
        (d(conversations="false", teacher_answers=0), "there is nothing to learn on"),
        ({**TOKENS, **d(temperature=2)}, "learns tokens, not distributions"),
        (d(loss="cross_entropy", on_policy=0.5), "the student would learn its own answers as they are"),
        ({**TOKENS, **d(teacher="x", teacher_answers=0, init="random")}, "nothing is learned from it"),
        ({**d(loss="hidden"), "distillation.student.hidden_size": 64}, "and the teacher's 128 cannot be compared"),
        ({**TOP_K, **d(on_policy=0.5)}, r"distillation\.on_policy=0\.5 with distillation\.teacher=topk:x: stored"),
        ({**TOP_K, **d(teacher_answers=7)}, r"Use --set distillation\.teacher_answers=0"),
        ({**TOP_K, **d(init="teacher_layers")}, r"Use --set distillation\.init=random"),
        ({**TOP_K, **d(loss="hidden")}, r"Use --set distillation\.loss=forward_kl"),
        ({**TOP_K, **d(teacher_layout={"pp_size": 2})}, r"Use --set distillation\.teacher_layout=null"),
    ],
)
def test_what_cannot_work_or_changes_nothing_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, settings)


@pytest.mark.parametrize(
    "settings",
    [
        TOP_K,
        {"grpo.scale_rewards": "none", "grpo.sampler_correction": "none"},
        d(loss="jsd", jsd_beta=0.1, on_policy=1.0, prompts_per_step=8, conversations="false", teacher_answers=0),
        {**TOKENS, **d(teacher_answers=0, conversations="true")},  # the student trained by SFT alone
        {**TOKENS, **d(teacher="x", conversations="false")},  # traces of a teacher with another tokenizer
        d(loss="hidden", hidden_weight=0.5),
        {"grpo.overlong_buffer": 20, "grpo.overlong_penalty": 0.5, "grpo.resample_rounds": 2},
        {"grpo.rollout.workers": 2, "grpo.rollout.max_staleness": 1},
        {"stages": "[data_prep, pretrain, sft]", "grpo.rewards": "{}"},  # of a stage that the run does not have
    ],
)
def test_what_works_is_accepted(settings: dict[str, object]) -> None:
    load_config(None, settings)
