"""`serve`: a trained model behind an API that client libraries know, and a chat page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from ray_pipeline.serving.engines import RunningEngine, ServedModel

ENGINES = ("auto", "llamacpp", "vllm", "native")


@click.command()
@click.argument("model")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="What runs the model.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: reachable from other machines.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--api-key", envvar="RAY_PIPELINE_API_KEY", help="What clients must send. Default: none is asked for.")
@click.option("--slots", type=click.IntRange(1, 1024), default=8, show_default=True, help="Answers written together.")
@click.option("--context", type=click.IntRange(8, 1 << 27), help="Tokens of prompt and answer. Default: the model's.")
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads. Default: all cores.")
@click.option(
    "--speculative", is_flag=True, help="llamacpp: draft with the model's MTP module; the same greedy answers."
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
    runs_dir: str | None,
) -> int:
    """Serve MODEL: a run, RUN:STAGE, a model folder (checkpoint or Hugging Face), or a .gguf file."""
    from ray_pipeline.cli.served_model import find_served

    _need_packages()
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key and api_key):
        raise UserError("--api-key: must be ASCII letters, digits and signs, without spaces around it.")
    import torch

    from ray_pipeline.serving.engines import EngineSettings, choose_engine, known_engines, preference
    from ray_pipeline.serving.http_server import bind, guard_rules, run_server

    served = find_served(model, output_dir(runs_dir))
    order = preference(has_gpu=torch.cuda.is_available())
    chosen = choose_engine(served, engine, known_engines(), order)
    if speculative and chosen.name != "llamacpp":
        raise UserError(
            f"--speculative: the engine {chosen.name} does not draft. Use --engine llamacpp, or leave the flag out."
        )
    listening = bind(host, port)  # before the model is loaded, which may take long
    try:
        click.echo(f"Loading {served.name} with the engine {chosen.name} ...")
        running = chosen.start(served, EngineSettings(slots, context, threads, speculative))
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
