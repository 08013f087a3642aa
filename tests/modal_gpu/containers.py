"""Containers of the stand-in: processes that run Modal's own entry point, each with its own copy of the volumes.

A container has its own processes, mounts and shared memory (`unshare`), so that killing it ends all of it, as when
Modal takes one away. What it did not commit is lost with it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import grpclib.server
from modal_proto import api_pb2 as pb

from tests.modal_gpu.stand_in import Service
from tests.modal_gpu.world import Call, World

ROOT = Path(__file__).resolve().parents[2]
Stat = dict[str, tuple[int, int]]


def can_contain() -> bool:
    """Whether this machine lets us make namespaces."""
    done = subprocess.run([*_unshare(), "true"], capture_output=True, check=False)
    return done.returncode == 0


def _unshare() -> list[str]:
    own = [] if os.getuid() == 0 else ["--map-root-user", "--user"]
    return ["unshare", *own, "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]


def _stat(folder: Path) -> Stat:
    found: Stat = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                seen = path.stat()
                found[path.relative_to(folder).as_posix()] = (seen.st_size, seen.st_mtime_ns)
        except FileNotFoundError:
            pass
    return found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.copied")
    try:
        shutil.copy2(source, aside)
    except FileNotFoundError:
        return
    os.replace(aside, target)


class View:
    """A container's own copy of a volume."""

    def __init__(self, volume: Path, folder: Path):
        self.volume, self.folder = volume, folder
        self.known: Stat = {}
        folder.mkdir(parents=True)
        volume.mkdir(parents=True, exist_ok=True)
        self.reload()

    def reload(self) -> None:
        self.known = self._bring(self.volume, self.folder)

    def commit(self) -> None:
        self.known = self._bring(self.folder, self.volume)

    def _bring(self, source: Path, target: Path) -> Stat:
        """What changed at the source since both were alike."""
        now = _stat(source)
        for name in now:
            if self.known.get(name) != now[name]:
                _copy(source / name, target / name)
        for name in self.known.keys() - now.keys():
            (target / name).unlink(missing_ok=True)
        for path in sorted(target.rglob("*"), reverse=True):
            if path.is_dir() and not (source / path.relative_to(target)).exists() and not any(path.iterdir()):
                path.rmdir()
        return self.known | now if source == self.volume else now


class Task:
    """One container, at work on one input."""

    def __init__(self, world: World, call: Call, group: Group, rank: int):
        self.world, self.call, self.group, self.rank = world, call, group, rank
        self.id = world.new("ta")
        self.definition = world.functions[call.function]
        self.folder = world.root / "t" / self.id
        self.folder.mkdir(parents=True)
        self.ray = Path(tempfile.mkdtemp(prefix="m"))  # sockets have short names
        self.views = {
            mount.volume_id.removeprefix("vo-"): (mount.mount_path, View(
                world.volume(mount.volume_id.removeprefix("vo-")), self.folder / "views" / mount.volume_id
            ))
            for mount in self.definition.volume_mounts
        }  # fmt: skip
        self.taken, self.preempted = False, False
        self.commits = 0
        self.process: subprocess.Popen[bytes] | None = None

    # what the container asks of the service
    def take(self) -> pb.FunctionGetInputsItem | None:
        if self.taken:
            return None
        self.taken = True
        return pb.FunctionGetInputsItem(
            input_id=f"in-{self.call.id}", input=self.call.item, function_call_id=self.call.id,
            retry_count=self.call.deliveries,
        )  # fmt: skip

    def gave(self, item: pb.FunctionPutOutputsItem) -> None:
        if self.rank == 0:
            self.world.finish(self.call, item.result, item.data_format)

    def ended(self, result: pb.GenericResult) -> None:
        if result.status not in (0, pb.GenericResult.GENERIC_STATUS_SUCCESS):
            self.group.result = result

    def commit(self, volume: str) -> None:
        self.views[volume][1].commit()
        self.commits += 1

    def reload(self, volume: str) -> None:
        self.views[volume][1].reload()

    async def join(self, request: pb.TaskClusterHelloRequest) -> pb.TaskClusterHelloResponse:
        addresses = [f"127.0.0.{10 + rank}" for rank in range(self.group.size)]
        return pb.TaskClusterHelloResponse(
            cluster_id="cu-1", cluster_rank=self.rank, container_ips=addresses, container_ipv4_ips=addresses
        )

    # its life
    async def live(self) -> int:
        """Run it to its end; the exit status."""
        server = grpclib.server.Server([Service(self.world, self)])
        socket = self.folder / "s"
        await server.start(path=str(socket))
        arguments = self.folder / "arguments"
        arguments.write_bytes(self._arguments().SerializeToString())
        env = self._environment(socket, arguments)
        mounts = [f"mount --bind {view.folder} {place}" for place, view in self.views.values()]
        if self.group.size > 1:
            (self.folder / "hosts").write_text("127.0.0.1 localhost\n::1 i6pn.modal.local\n")
            mounts.append(f"mount --bind {self.folder}/hosts /etc/hosts")
        script = " && ".join(
            ["mount -t tmpfs tmpfs /dev/shm", *mounts, f"{sys.executable} -m modal._container_entrypoint"]
        )
        script += "; exit $?"  # not itself the first process: Ray takes a parent with that number for one that died
        for place, _ in self.views.values():
            Path(place).mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [*_unshare(), "sh", "-c", script], env=env, cwd=self.folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        status = await asyncio.to_thread(self.process.wait)
        await asyncio.to_thread(reader.join, 5)
        shutil.rmtree(self.ray, ignore_errors=True)
        server.close()
        if not self.preempted:  # Modal commits what a container leaves when it ends by itself
            for _, view in self.views.values():
                view.commit()
        return status

    def kill(self) -> None:
        """Take it away."""
        if self.process is not None and self.process.poll() is None:
            self.preempted = True
            self.process.kill()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        app = self.world.function_app[self.call.function]
        for line in self.process.stdout:
            self.world.logs.append((app, self.call.id, line.decode(errors="replace")))

    def _arguments(self) -> pb.ContainerArguments:
        app = self.world.function_app[self.call.function]
        return pb.ContainerArguments(
            task_id=self.id, function_id=self.call.function, app_id=app, function_def=self.definition,
            app_layout=pb.AppLayout(), environment_name="main",
        )  # fmt: skip

    def _environment(self, socket: Path, arguments: Path) -> dict[str, str]:
        keys = {
            name: value for secret in self.definition.secret_ids for name, value in self.world.secrets[secret].items()
        }
        # Of a cluster each has one CPU, so that Ray cannot place the ranks of two on one of them.
        cpus = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'} if self.group.size > 1 else {}
        return keys | self.group.extra | cpus | {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(ROOT), "MODAL_IS_REMOTE": "1",
            "MODAL_SERVER_URL": f"unix://{socket}", "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
            "MODAL_TASK_ID": self.id, "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_OCI", "RAY_TMPDIR": str(self.ray),
            "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip


class Group:
    """The containers that one delivery of an input gets: one, or those of a cluster."""

    def __init__(self, size: int, extra: dict[str, str]):
        self.size, self.extra = size, extra
        self.tasks: list[Task] = []
        self.result: pb.GenericResult | None = None


class Containers:
    """Gives every call its containers, again when they are taken away or crash, as Modal does."""

    def __init__(self, world: World, extra: dict[str, str] | None = None):
        self.world, self.extra = world, extra or {}
        self.groups: list[Group] = []
        self.looks: list[Callable[[Task], None]] = []  # called now and then with every container that lives
        world.start, world.end = self._start, self._end

    def of(self, name: str) -> list[Group]:
        """Groups that worked for the function of that name."""
        return [group for group in self.groups if group.tasks[0].definition.function_name == name]

    def stop(self) -> None:
        """End all of them."""
        self.world.start = None
        for group in self.groups:
            for task in group.tasks:
                task.kill()

    def _start(self, world: World, call: Call) -> None:
        assert world.loop is not None
        task = world.loop.create_task(self._serve(call))
        self._kept = [*getattr(self, "_kept", []), task]

    def _end(self, world: World, call: Call, terminate: bool) -> None:
        for group in self.groups:
            for task in group.tasks:
                if task.call is call:
                    task.kill()

    async def _serve(self, call: Call) -> None:
        while call.output is None:
            definition = self.world.functions[call.function]
            size = max(1, definition._experimental_group_size)
            group = Group(size, self.extra)
            group.tasks = [Task(self.world, call, group, rank) for rank in range(size)]
            self.groups.append(group)
            lives = [asyncio.ensure_future(task.live()) for task in group.tasks]
            while not all(life.done() for life in lives):
                await asyncio.wait(lives, timeout=0.1)
                for task in group.tasks:
                    for look in self.looks:
                        await asyncio.to_thread(look, task)
                if any(life.done() for life in lives) and (call.output is not None or self._lost(group, lives)):
                    for task in group.tasks:
                        task.kill()
            call.deliveries += 1
            if call.output is None and not any(task.preempted for task in group.tasks):
                self._crashed(call, group)

    @staticmethod
    def _lost(group: Group, lives: list[asyncio.Future[int]]) -> bool:
        return any(
            life.done() and (life.result() or task.preempted) for task, life in zip(group.tasks, lives, strict=True)
        )

    def _crashed(self, call: Call, group: Group) -> None:
        """It ended without an output: again, as often as its function says."""
        call.retries += 1
        if call.retries > self.world.functions[call.function].retry_policy.retries:
            status = pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE
            self.world.finish(call, group.result or pb.GenericResult(status=status, exception="container exited"))
