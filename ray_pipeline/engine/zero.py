"""ZeRO (arXiv:1910.02054): optimizer state sharded over replicas. The only file that imports deepspeed."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from model.transformer import Transformer
from ray_pipeline.config import OptimizerConfig
from ray_pipeline.engine.optimizer import build_adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdater:
    """One DeepSpeed engine per pipeline stage; the pipeline itself is ours.

    The module is called directly, not through the engine: ZeRO 1 needs no autograd hooks, gradients accumulate in fp32
    in `.grad` and `step` reduces them.
    """

    def __init__(self, model: Transformer, mesh: Mesh, config: OptimizerConfig, zero_stage: int):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        import deepspeed.ops

        # On CPU, DeepSpeed would otherwise compile its shared-memory collectives at start, and fail without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model, self.mesh = model, mesh
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # Gradients of all micro-batches gather in `.grad`; `step` is the only boundary.
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.grad_clip,
            "zero_optimization": {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
        }
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=model, optimizer=build_adamw(model, config), config=settings, mpu=mesh, dist_init_required=False
        )
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer

    def step(self) -> float:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # DeepSpeed averages over replicas; our losses are already divided by the global weight.
                parameter.grad = (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.mul_(self.mesh.dp)
                )
        self.zero.setup_buckets()
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _flat_groups(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def _relink(self) -> None:
        """Point every parameter at its part of the flat state; DeepSpeed itself links the first group alone."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        states: list[dict[str, Any]] = [s for s in self.optimizer.state.values() if "step" in s]
        out: dict[str, Tensor] = {"step": torch.tensor(float(states[0]["step"]) if states else 0.0)}
        if states:
            self._relink()
        for name, parameter in self.model.named_parameters():
            out[f"model.{name}"] = safe_get_full_fp32_param(parameter).view(parameter.shape)
            for key in MOMENTS:
                full = safe_get_full_optimizer_state(parameter, key) if states else torch.zeros_like(parameter)
                out[f"{key}.{name}"] = full.view(parameter.shape)
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for flat in self._flat_groups():  # torch's AdamW makes its state lazily; it must exist to be set
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": state["step"].clone(), **moments}
        self._relink()
        for name, parameter in self.model.named_parameters():
            safe_set_full_fp32_param(parameter, state[f"model.{name}"])
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{key}.{name}"], key)
        self.zero.update_lp_params()
