"""Cross-entropy against torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model.init import init_weights
from model.layers.loss import IGNORE
from model.transformer import Transformer
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.engine.test_parity import CONFIG, make_batch


def test_cross_entropy_counts_labelled_tokens_and_adds_mtp():
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, 0)
    hidden = torch.randn(8, 16, CONFIG.hidden_size, generator=torch.Generator().manual_seed(5))
    batch = make_batch(1)
    objective = CrossEntropy(mtp_weight=0.5)
    embeddings = torch.randn(hidden.shape[0], hidden.shape[1] + 1, hidden.shape[2])
    total, main, ahead, tokens = objective(model, hidden, embeddings, batch).tolist()
    assert objective.weight(batch) == int((batch.labels != IGNORE).sum())
    torch.testing.assert_close(total, main + 0.5 * ahead, rtol=1e-5, atol=0)
    assert 0 < tokens < objective.weight(batch)
    logits = F.linear(hidden, model.lm_head.weight).transpose(1, 2)
    expected = float(F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=IGNORE).detach())
    torch.testing.assert_close(main, expected, rtol=1e-5, atol=0)
