"""What of a part's weights is trained where low-rank adapters are put on it: the adapters alone."""

from __future__ import annotations

from ray_pipeline.costs.weights import Weight, part_weights
from ray_pipeline.costs.workload import Workload
from ray_pipeline.settings.lora_targets import chosen_targets, linear_layers


def trained_weights(work: Workload, layers: range) -> list[Weight]:
    """Of the pipeline stage of `layers`: all its weights, or two matrices for every layer with an adapter."""
    if work.lora is None:
        return part_weights(work.model, layers)
    targets, r = chosen_targets(work.model, work.lora.target_modules), work.lora.r
    sizes = [r * width for name, *widths in linear_layers(work.model, layers) if name in targets for width in widths]
    return [Weight("adapters", size, size, size) for size in sizes]
