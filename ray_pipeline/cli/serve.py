"""`serve`: a trained model behind an API that client libraries know, and a chat page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from ray_pipeline.serving.engines import Engine, EngineSettings, RunningEngine, ServedModel

ENGINES = ("auto", "llamacpp", "vllm", "native")
MOST_REPLICAS = 4096


class Replicas(click.ParamType[tuple[int, int]]):
    """`2`, or `1:4` for as many of them as requests need."""

    name = "N or LEAST:MOST"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Both numbers, equal for a single one."""
        if isinstance(value, tuple):
            return value
        least, colon, most = value.partition(":")
        numbers = [least, most if colon else least]
        if all(n.isascii() and n.isdigit() for n in numbers) and 1 <= int(least) <= int(numbers[1]) <= MOST_REPLICAS:
            return int(least), int(numbers[1])
        self.fail(f"{value!r} is no number of replicas. Give one, as 2, or a range, as 1:4.", param, ctx)


@click.command()
@click.argument("model")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="What runs the model.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: reachable from other machines.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--api-key", envvar="RAY_PIPELINE_API_KEY", help="What clients must send. Default: none is asked for.")
@click.option("--slots", type=click.IntRange(1, 1024), default=8, show_default=True, help="Answers written together.")
@click.option("--context", type=click.IntRange(8, 1 << 27), help="Tokens of prompt and answer. Default: the model's.")
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads. Default: all cores, shared by replicas.")
@click.option(
    "--speculative", is_flag=True, help="llamacpp: draft with the model's MTP module; the same greedy answers."
)
@click.option(
    "--replicas", type=Replicas(), help="Copies of the engine, by Ray Serve; here, or where RAY_ADDRESS says."
)
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def serve(
    model: str,
    engine: str,
    host: str,
    port: int,
    api_key: str | None,
    slots: int,
    context: int | None,
    threads: int | None,
    speculative: bool,
    replicas: tuple[int, int] | None,
    runs_dir: str | None,
) -> int:
    """Serve MODEL: a run, RUN:STAGE, a model folder (checkpoint or Hugging Face), or a .gguf file."""
    from ray_pipeline.cli.served_model import find_served

    _need_packages()
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key and api_key):
        raise UserError("--api-key: must be ASCII letters, digits and signs, without spaces around it.")
    from ray_pipeline.serving.engines import EngineSettings
    from ray_pipeline.serving.http_server import bind, guard_rules, run_server

    served = find_served(model, output_dir(runs_dir))
    listening = bind(host, port)  # before the model is loaded, which may take long
    try:
        running = _start(served, engine, EngineSettings(slots, context, threads, speculative), replicas)
        try:
            address = _address(host, listening.getsockname()[1])
            run_server(
                running.app, listening, guard_rules(host, api_key), lambda: announce(served, running, address, api_key)
            )
        finally:
            running.stop()
    finally:
        listening.close()
    return 0


def _start(
    served: ServedModel, engine: str, settings: EngineSettings, replicas: tuple[int, int] | None
) -> RunningEngine:
    """The engine that was asked for, or the first that can, with the model loaded: in this process or in replicas."""
    from ray_pipeline.serving.engines import choose_engine, known_engines, preference

    def choose(*, has_gpu: bool) -> Engine:
        chosen = choose_engine(served, engine, known_engines(), preference(has_gpu=has_gpu))
        if settings.speculative and chosen.name != "llamacpp":
            raise UserError(
                f"--speculative: the engine {chosen.name} does not draft. Use --engine llamacpp, or leave it out."
            )
        return chosen

    if replicas is None:
        import torch

        chosen = choose(has_gpu=torch.cuda.is_available())
        click.echo(f"Loading {served.name} with the engine {chosen.name} ...")
        return chosen.start(served, settings)
    from ray_pipeline.serving.ray_replicas import ReplicaCount, close_ray, open_ray, start_replicas

    count = ReplicaCount(*replicas)
    try:
        cluster = open_ray()
        chosen = choose(has_gpu=cluster.gpus > 0)
        click.echo(f"Loading {served.name} with {count} of the engine {chosen.name} ...")
        return start_replicas(chosen.name, served, settings, count, cluster)
    except BaseException:
        close_ray()
        raise


def _need_packages() -> None:
    """Raises UserError where the extra `serve` is not installed."""
    import importlib.util

    missing = [
        name for name in ("fastapi", "uvicorn", "sse_starlette", "httpx") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}. Install them: pip install 'ray-pipeline[serve]'")


def _address(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"http://{name}:{port}"


def announce(model: ServedModel, engine: RunningEngine, address: str, api_key: str | None) -> None:
    """Tell where it is and how to ask it."""
    body = json.dumps({"model": model.name, "messages": [{"role": "user", "content": "What is 2+3?"}]})
    key = "" if api_key is None else " -H 'Authorization: Bearer YOUR_KEY'"
    click.echo(f"{model.name} is served by {engine.name}. Ctrl-C stops it.")
    click.echo(f"  chat page  {address}/")
    click.echo(f"  API        {address}/v1   (OpenAI's; the model is called {model.name})")
    click.echo(f"  try        curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
