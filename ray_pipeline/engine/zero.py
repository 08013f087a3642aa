"""ZeRO 1-3 (arXiv:1910.02054) through DeepSpeed: one DeepSpeed engine per pipeline rank, driven by our own pipeline.

The only file that imports deepspeed. It sees fp32 weights always (bf16 runs compute under autocast), dense parameters
replicated over dp x sp, and experts replicated over the ranks that hold the same ones. What DeepSpeed gets wrong in
this setting is worked around here, each place with a note; tests/engine/test_deepspeed.py fails without them.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from model.parallel.shard_plan import shard_of
from ray_pipeline.engine import zero_settings
from ray_pipeline.engine.optimizer import MOMENTS, build_optimizer, expert_group_name, is_cut_expert
from ray_pipeline.engine.untouched import Arrivals, KeptParts
from ray_pipeline.settings.schema import OptimizerConfig


class ZeroUpdater:
    """DeepSpeed's optimizer for this rank's parameters.

    Args:
        module: what runs forward; with `zero_stage` >= 2 call `run` instead, whose hooks reduce and gather.
        named: the module's parameters by global name.
    """

    def __init__(
        self,
        module: nn.Module,
        named: dict[str, nn.Parameter],
        mesh: Mesh,
        config: OptimizerConfig,
        *,
        zero_stage: int,
        offload_optimizer: bool = False,
    ):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls torch's collectives by names that newer releases rename.
        warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
        import deepspeed
        import deepspeed.ops

        # On CPU, DeepSpeed would otherwise compile its shared-memory collectives at start, and fail without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.named, self.mesh, self.zero_stage = named, mesh, zero_stage
        assert config.name != "muon", "layout.rules refuses parts of matrices"
        self.moments = MOMENTS[config.name]
        self.loss_scale = float(mesh.sizes.replicas)  # DeepSpeed averages gradients over replicas
        _mark_parameters(named, mesh)
        if any(is_cut_expert(name, mesh) for name in named):
            _announce_experts(module, named, mesh, zero_stage)
        if zero_stage == 3:
            _skip_world_wide_checks()
            _sum_expert_norms()
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(named, config, mesh),
            config=_settings(config, zero_stage, offload_optimizer, sum(p.numel() for p in named.values())),
            mpu=mesh,
            dist_init_required=False,
        )
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.arrivals = Arrivals(named, mesh, by_hook=zero_stage >= 2)
        self.kept = KeptParts(self.optimizer, self.moments)
        if mesh.sizes.ep > 1 and mesh.sizes.pp > 1 and not any(is_cut_expert(name, mesh) for name in named):
            _count_experts_of_other_stages(self.zero, mesh, zero_stage)

    def run(self, *args: Any) -> Any:
        """The module's forward; under ZeRO 2 and 3 inside DeepSpeed's hooks, under ZeRO 1 without them."""
        return self.engine(*args) if self.zero_stage >= 2 else self.engine.module(*args)

    def before_backward(self) -> None:
        """1F1B runs backwards without a forward between them, at which DeepSpeed would have reset its hooks."""
        if self.zero_stage >= 2:
            self.zero.clear_backward_seen_flag()

    def expect(self, backwards: int) -> None:
        """DeepSpeed reduces after every backward (ZeRO 2, 3), or at the step (ZeRO 1)."""

    def step(self, accept: Callable[[float], bool] | None = None) -> tuple[float, bool]:
        assert accept is None, "the settings refuse it: DeepSpeed moves the weights at once"
        self._keep(self.arrivals.missed(self.arrivals.here()))
        if self.zero_stage == 1:
            for parameter in self.named.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.zero.setup_buckets()  # no hook has fired; `step` reduces what gathered in `.grad`
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0 else math.inf, True  # DeepSpeed's -1 stands for a norm that is no number

    def _keep(self, missed: set[str]) -> None:
        """Parameters that no gradient reached: to DeepSpeed their gradient is zero, or under ZeRO 3 an earlier one."""
        self.kept.parts = {}
        for name in missed:
            parameter: Any = self.named[name]
            if self.zero_stage == 3:
                group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                self.zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)[0].zero_()
                flat = self.zero.fp32_partitioned_groups_flat[group]
            else:
                part = parameter._hp_mapping  # none of it may be here
                if part is None:
                    continue
                flat = self.zero.single_partition_of_fp32_groups[part.param_group_index]
                start, length = part.hp_fragment_address.start, part.hp_fragment_address.numel
            self.kept.parts.setdefault(flat, []).append((start, length))

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.zero_stage < 3:
            return {name: parameter.detach() for name, parameter in self.named.items()}
        return {n: safe_get_full_fp32_param(p).view(_shape(p)) for n, p in self.named.items()}

    def held(self) -> list[Tensor]:
        z = self.zero
        return list(z.fp32_partitioned_groups_flat if self.zero_stage == 3 else z.single_partition_of_fp32_groups)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters) if self.zero_stage == 3 else nullcontext()

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        started = [s for s in self.optimizer.state.values() if "step" in s]
        out: dict[str, Tensor] = {"step": torch.tensor(float(started[0]["step"]) if started else 0.0)}
        self._relink()
        for name, parameter in self.named.items():
            shape = _shape(parameter)
            out[f"model.{name}"] = safe_get_full_fp32_param(parameter).view(shape)
            for key in self.moments:
                full = safe_get_full_optimizer_state(parameter, key) if started else torch.zeros(shape)
                out[f"{key}.{name}"] = full.view(shape)
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.moments:
            for flat in self.held():  # torch's AdamW makes its state lazily; it must exist to be set
                moments = {key: torch.zeros_like(flat) for key in self.moments}
                self.optimizer.state[flat] = {"step": state["step"].clone(), **moments}
        self._relink()
        for name, parameter in self.named.items():
            safe_set_full_fp32_param(parameter, state[f"model.{name}"].contiguous())
            for key in self.moments:
                safe_set_full_optimizer_state(parameter, state[f"{key}.{name}"].contiguous(), key)
        if self.zero_stage < 3:
            self.zero.update_lp_params()
        else:
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def _relink(self) -> None:
        """Point every parameter at its part of the flat state; DeepSpeed itself links the first group alone."""
        if self.zero_stage < 3 and self.optimizer.state:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def _shape(parameter: nn.Parameter) -> torch.Size:
    """ZeRO 3 leaves an empty tensor behind and keeps the shape aside."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _settings(config: OptimizerConfig, zero_stage: int, offload_optimizer: bool, numbers: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "reduce_bucket_size": zero_settings.reduce_bucket(numbers),
        # Reduction beside computation needs streams, which the CPU has none of.
        "overlap_comm": zero_stage >= 2 and torch.cuda.is_available(),
        "contiguous_gradients": True,  # ZeRO 1 with experts counts gradients twice without it
    }
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = zero_settings.PERSISTENT
        zero["stage3_max_live_parameters"] = zero_settings.LIVE
        zero["stage3_prefetch_bucket_size"] = zero_settings.PREFETCH
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Gradients of all micro-batches gather; `step` is the only boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # theirs is compiled at start; torch's AdamW runs on the CPU as well
    }


def _mark_parameters(named: dict[str, nn.Parameter], mesh: Mesh) -> None:
    """Tell the gradient norm which parameters are slices; the others count on one tensor-parallel rank alone."""
    for name, parameter in named.items():
        parameter.model_parallel = mesh.sizes.tp > 1 and shard_of(name).tp_dim is not None  # type: ignore[attr-defined]


def _announce_experts(module: nn.Module, named: dict[str, nn.Parameter], mesh: Mesh, zero_stage: int) -> None:
    """Publish our expert groups under the names DeepSpeed looks up, and mark the experts' parameters."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    name, ep, replicas = expert_group_name(mesh), mesh.axis("ep"), mesh.axis("expert_replica")
    groups._EXPERT_PARALLEL_GROUP[name] = ep.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(ep.ranks)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.group_or_alone("expert_replica")
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(replicas.ranks)

    class Marker(MoE):  # type: ignore[misc]  # DeepSpeed has no types
        """Makes DeepSpeed treat the model as one with experts, without its own MoE layer."""

        def __init__(self, num_experts: int):
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups exist already."""

    for key, parameter in named.items():
        if not is_cut_expert(key, mesh):
            continue
        expert: Any = parameter
        expert.allreduce, expert.group_name = False, name
        if zero_stage == 3:
            expert.ds_zero_placement_family, expert.ds_zero_partition_group_name = "autoep_expert", name
            expert.ds_zero_partition_process_group = mesh.group_or_alone("expert_replica")
    if zero_stage < 3:
        module.deepspeed_marker = Marker(mesh.sizes.ep)


def _skip_world_wide_checks() -> None:
    """ZeRO 3 compares integers over the whole world; pipeline ranks, whose parameters differ, would hang or fail."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def _sum_expert_norms() -> None:
    """ZeRO 3 does not sum the experts' part of the gradient norm over tensor- and pipeline-parallel ranks."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    DeepSpeedZeroOptimizer_Stage3._grad_norm_counts_every_rank = lambda self, params, process_group: False


def _count_experts_of_other_stages(zero: Any, mesh: Mesh, zero_stage: int) -> None:
    """The norm is reduced over pipeline ranks once per parameter group, and a stage of dense layers has no experts'.

    Without its part in that reduction the other stages would wait forever, and it would clip by another norm.
    """

    from deepspeed.runtime.zero.utils import get_norm_dtype

    # What the other stages reduce; only ZeRO 3 without offloading reduces it as computed.
    dtype = get_norm_dtype() if zero_stage == 3 and not zero.offload_optimizer else torch.float32

    def experts_norm() -> Tensor:
        squares = torch.zeros(1, dtype=dtype, device=zero.device)
        zero._model_parallel_all_reduce(tensor=squares, op=torch.distributed.ReduceOp.SUM)
        if zero_stage == 3:  # there the experts of a stage are summed over expert-parallel ranks last
            squares = mesh.all_reduce(squares, "ep")
        return squares.sqrt().squeeze(0).float()

    if zero_stage == 3:
        groups = zero._get_norm_groups
        zero._get_norm_groups = lambda: [*groups(), experts_norm()]
    else:
        norm = zero.scaled_global_norm
        zero.scaled_global_norm = lambda *args, **kwargs: torch.hypot(norm(*args, **kwargs), experts_norm())
