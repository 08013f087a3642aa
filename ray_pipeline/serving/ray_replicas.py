"""Replicas of an engine by Ray Serve, on this machine or on the cluster that RAY_ADDRESS names.

Ray Serve places them, replaces those that end or fail their health check, adds and removes some as requests come, and
lets requests wait while all are busy. Its own HTTP proxy is off: requests come through `replica_door`, whose guard,
keys and errors are those of a single engine.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.launch.cluster import Cluster, alive, cluster_address, connect
from ray_pipeline.launch.local_ray import start_local_ray
from ray_pipeline.serving.engines import EngineSettings, RunningEngine, ServedModel
from ray_pipeline.serving.guard import Message
from ray_pipeline.serving.replica import EngineReplica, ForwardedRequest
from ray_pipeline.serving.replica_door import ReplicaLost, TooMany, replica_app

INSTALL = "--replicas needs Ray Serve. Install it: pip install 'ray-pipeline[replicas]'"
DEPLOYMENT = "engine"
# A replica is given twice as many requests as it has slots: one that becomes free has the next at hand.
ONGOING_PER_SLOT = 2
HEALTH_SECONDS, HEALTH_LATE_SECONDS = 5.0, 60.0  # a long prompt on a busy machine is no illness
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10.0, 300.0  # of more, or fewer, requests than the replicas are for
MOST_TRIES = 3  # of a request whose replica ended before it answered anything
ERROR = "ray_pipeline.errors.UserError: "


@dataclass(frozen=True)
class ReplicaCount:
    """How many replicas there are: `least`, and up to `most` while requests wait.

    Attributes:
        queued: requests that may wait for a replica; more are refused.
    """

    least: int
    most: int
    queued: int = 1024

    def __str__(self) -> str:
        number = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{number} replica{'s' * (self.most > 1)}"


def open_ray() -> Cluster:
    """Join the cluster that RAY_ADDRESS names, or start Ray here.

    Raises:
        UserError: Ray Serve is not installed, or no cluster answers.
        StageFailed: Ray's processes do not start.
    """
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise UserError(INSTALL) from None
    address = cluster_address()
    if address is None:
        start_local_ray()
    else:
        connect(address)
    return alive()


def close_ray() -> None:
    """Leave the cluster; end Ray where it was started here."""
    import ray

    ray.shutdown()


def start_replicas(
    engine: str, model: ServedModel, settings: EngineSettings, count: ReplicaCount, cluster: Cluster
) -> RunningEngine:
    """Start the replicas and wait until `count.least` of them answer. Ray has to be open.

    Raises:
        UserError: the cluster cannot hold them, or a replica cannot load the model.
        StageFailed: Ray Serve does not bring them up.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    settings, resources = share(engine, settings, count, cluster)
    name = f"ray-pipeline-{secrets.token_hex(4)}"
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells of its start, and warns of every refused request
    serve.start(proxy_location="Disabled", logging_config=quiet)
    deployment: Any = serve.deployment(
        EngineReplica, name=DEPLOYMENT, logging_config=quiet, ray_actor_options=resources,
        max_ongoing_requests=ONGOING_PER_SLOT * settings.slots, max_queued_requests=count.queued,
        health_check_period_s=HEALTH_SECONDS, health_check_timeout_s=HEALTH_LATE_SECONDS,
        max_constructor_retry_count=1, **_scaling(count, settings),
    )  # fmt: skip
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            return
        stopped = True
        if cluster_address() is None:
            serve.shutdown()
        else:  # others' applications stay
            serve.delete(name)
        close_ray()

    try:
        handle = serve.run(deployment.bind(engine, model, settings), name=name, route_prefix=None)
    except RuntimeError as error:
        stop()
        raise _explain(str(error)) from None
    except BaseException:
        stop()
        raise
    replicas = Replicas(name, handle.options(stream=True))
    return RunningEngine(f"{count} of {engine}", replica_app(replicas, engine), stop)


def share(
    engine: str, settings: EngineSettings, count: ReplicaCount, cluster: Cluster
) -> tuple[EngineSettings, dict[str, Any]]:
    """What each replica gets: threads, and what Ray sets aside for it. On GPUs, one each.

    Raises:
        UserError: the cluster cannot hold so many.
    """
    if cluster.gpus and engine != "llamacpp":
        if cluster.gpus < count.least:
            raise UserError(f"--replicas {count.least}: each takes a GPU, and {cluster.describe()}. Give fewer.")
        return settings, {"num_cpus": 1, "num_gpus": 1}
    cpus = [node.cpus for node in cluster.nodes]
    if settings.threads is None:
        largest = int(max(cpus, default=0))
        threads = next((t for t in range(largest, 0, -1) if _fitting(cpus, t) >= count.most), 1)
        settings = replace(settings, threads=threads)
    if (most := _fitting(cpus, settings.threads or 1)) < count.least:
        raise UserError(
            f"--replicas {count.least}: with {settings.threads} CPU threads each {most} of them fit, for "
            f"{cluster.describe()}. Give fewer, or fewer --threads."
        )
    return settings, {"num_cpus": settings.threads}


def _fitting(cpus: list[float], threads: int) -> int:
    return sum(int(one // threads) for one in cpus)


def _scaling(count: ReplicaCount, settings: EngineSettings) -> dict[str, Any]:
    if count.least == count.most:
        return {"num_replicas": count.least}
    from ray.serve.config import AutoscalingConfig

    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=count.least, max_replicas=count.most, target_ongoing_requests=settings.slots,
            upscale_delay_s=UPSCALE_SECONDS, downscale_delay_s=DOWNSCALE_SECONDS,
        )
    }  # fmt: skip


def _explain(message: str) -> Exception:
    """Ray Serve's report that an application did not start, by the error of ours that is in it."""
    own = [line.partition(ERROR)[2] for line in message.splitlines() if ERROR in line]
    if own:
        return UserError(own[-1].strip())
    last = [line.strip() for line in message.splitlines() if line.strip()][-1:]
    return StageFailed(f"Ray Serve did not start the replicas: {''.join(last)[:500]}", message)


class Replicas:
    """The replicas as the door asks them."""

    def __init__(self, application: str, handle: Any):
        self._application, self._handle = application, handle

    async def ask(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        """One replica's answer. Another one gets the request where the first ended before it said anything.

        Raises:
            TooMany: all replicas are busy and enough requests wait.
            ReplicaLost: the replica ended within its answer, or one after another did.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        for _ in range(MOST_TRIES):
            answer, said = self._handle.answer.remote(request), False
            try:
                async for messages in answer:
                    said = True
                    yield messages
                return
            except BackPressureError:
                raise TooMany from None
            except DeploymentUnavailableError:
                raise ReplicaLost from None
            except RayActorError:
                if said:
                    raise ReplicaLost from None
            finally:
                answer.cancel()
        raise ReplicaLost

    def running(self) -> int:
        """Replicas that answer."""
        from ray import serve

        application = serve.status().applications.get(self._application)
        deployment: Any = None if application is None else application.deployments.get(DEPLOYMENT)
        return 0 if deployment is None else int(deployment.replica_states.get("RUNNING", 0))
