"""Samplers as Ray actors, driven by training rank 0: weights travel through the object store, answers come back.

An actor needs no CPU of Ray's: it works while the ranks wait, or beside them where rollouts may be one step old. One
that dies is replaced, gets the same weights and samples its shares again, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.generate.decode import Completion
from model.parallel.mesh import Mesh
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.rollouts.rollout import SampleRequest
from ray_pipeline.rollouts.samplers import Sampler, from_main, shares

# Threads of several actors may be more than there are cores; those that wait must not keep the others from working.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}
MAX_DEATHS = 3  # of actors during one step; past that, something kills all of them


class SamplingActor:
    """What runs in an actor. Holds whole weights and the number of their version."""

    def __init__(self, build: Callable[[], Sampler], threads: int):
        torch.set_num_threads(threads)
        self.sampler = build()
        self.version = -1

    def take(self, weights: Mapping[str, np.ndarray], version: int) -> str:
        """Use these weights; the checksum of what it then holds."""
        # Arrays in the object store are shared and read-only, which torch warns of: copy them.
        held = self.sampler.take({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        self.version = version
        return held

    def sample(self, requests: Sequence[SampleRequest], version: int) -> list[Completion]:
        """Answers by the weights of that version."""
        assert self.version == version, f"asked to sample with weights {version}, it holds {self.version}"
        return self.sampler.sample(requests)


@dataclass(eq=False)
class _Share:
    """Requests of one call, the actor that has them, and the future of the answers."""

    requests: list[SampleRequest]
    actor: int
    future: Any


class RayEngine:
    """`workers` actors. On ranks other than 0 it only waits for what rank 0 brings.

    Args:
        build: makes an actor's sampler, there; picklable.
        threads: of each actor's matrix products.
        gpus: of Ray's, for each actor.
    """

    def __init__(
        self,
        mesh: Mesh,
        build: Callable[[], Sampler],
        *,
        workers: int,
        share_rows: int,
        threads: int,
        gpus: int = 0,
        actor: type[SamplingActor] = SamplingActor,
    ):
        self.mesh, self.build, self.share_rows, self.threads, self.gpus = mesh, build, share_rows, threads, gpus
        self._class = actor
        self._weights: Any = None
        self._version = -1
        self._deaths = 0
        self._actors: list[Any] = []
        if mesh.rank == 0:
            import ray

            if not ray.is_initialized():  # ranks without Ray Train, in a debugger
                start_ray(include_dashboard=False)
            self._check_gpus(ray.cluster_resources().get("GPU", 0.0), workers)
            self._actors = [self._start() for _ in range(workers)]

    def _check_gpus(self, there: float, workers: int) -> None:
        needed = self.mesh.world + workers * self.gpus
        if self.gpus and there < needed:
            raise UserError(
                f"grpo.rollout.workers={workers}: with {self.mesh.world} training ranks they need {needed} GPUs, the "
                f"Ray cluster has {there:g}. Use fewer of either, or workers=0, which samples on the ranks' own GPUs."
            )

    def _start(self) -> Any:
        import ray

        # num_cpus=0: an actor that held a CPU could keep a restarted training rank from starting.
        remote: Any = ray.remote(num_cpus=0, num_gpus=self.gpus, runtime_env={"env_vars": QUIET})(self._class)
        return remote.remote(self.build, self.threads)

    def sync(self, state: Mapping[str, Tensor], version: int) -> str:
        return from_main(self.mesh, lambda: self._sync(state, version))

    def _sync(self, state: Mapping[str, Tensor], version: int) -> str:
        import ray

        self._version, self._deaths = version, 0
        self._weights = ray.put({name: tensor.detach().cpu().numpy() for name, tensor in state.items()})
        futures = [actor.take.remote(self._weights, version) for actor in self._actors]
        held = []
        for index, future in enumerate(futures):
            found = _result(future)
            held.append(self._replace(index) if found is None else found)
        return next((other for other in held if other != held[0]), held[0])

    def submit(self, requests: Sequence[SampleRequest]) -> list[_Share]:
        cut = shares(requests, self.share_rows) if self._actors else []
        return [self._send(_Share(part, i % len(self._actors), None)) for i, part in enumerate(cut)]

    def _send(self, share: _Share) -> _Share:
        share.future = self._actors[share.actor].sample.remote(share.requests, self._version)
        return share

    def collect(self, handle: list[_Share]) -> list[Completion]:
        return from_main(self.mesh, lambda: [answer for share in handle for answer in self._answers(share, handle)])

    def _answers(self, share: _Share, handle: list[_Share]) -> list[Completion]:
        while (answers := _result(share.future)) is None:
            self._replace(share.actor)
            # Everything that was sent to the dead one; what it had finished before is kept by the object store.
            for lost in handle[handle.index(share) :]:
                if lost.actor == share.actor:
                    self._send(lost)
        return answers

    def _replace(self, index: int) -> str:
        """A new actor in the place of a dead one; the checksum of the weights it was given.

        Raises:
            StageFailed: too many have died.
        """
        while True:
            self._deaths += 1
            if self._deaths > MAX_DEATHS:
                raise StageFailed(
                    f"rollout actors died {self._deaths} times since weights {self._version} were given to them: is "
                    "there enough memory for grpo.rollout.workers models beside the training ranks?"
                )
            self._actors[index] = self._start()
            if (held := _result(self._actors[index].take.remote(self._weights, self._version))) is not None:
                return held

    def close(self) -> None:
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
            self._actors = []


def _result(future: Any) -> Any:
    """What an actor returned; None where it is dead. Its own error is raised as it was there."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(future)
    except RayActorError:
        return None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
