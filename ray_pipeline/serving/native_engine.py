"""The engine `native`: our own decoder, for every architecture that this project trains."""

from __future__ import annotations

from ray_pipeline.errors import UserError
from ray_pipeline.serving.engines import EngineSettings, RunningEngine, ServedModel


class NativeEngine:
    """See `Engine`."""

    name = "native"

    def missing(self) -> str | None:
        """See `Engine`: it is part of this program."""
        return None

    def why_not(self, model: ServedModel) -> str | None:
        """It reads checkpoints and Hugging Face folders of our architectures."""
        if model.source is None:
            return "it reads checkpoints and Hugging Face folders, not .gguf files"
        if model.source.form == "transformers":
            return "the architecture is not one of this project's"
        return None

    def start(self, model: ServedModel, settings: EngineSettings) -> RunningEngine:
        """Load the weights, onto a GPU where there is one."""
        import torch

        from ray_pipeline.evaluation.models import load
        from ray_pipeline.serving.native_app import native_app
        from ray_pipeline.serving.native_model import NativeModel

        assert model.source is not None
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        loaded = load(model.source)
        context = loaded.backend.context
        if settings.context is not None:
            if settings.context > context:
                raise UserError(f"--context {settings.context}: the model's own is {context}. Give at most that.")
            loaded.backend.context = settings.context
        native = NativeModel(model.name, loaded, slots=settings.slots, bos=model.bos)
        return RunningEngine(self.name, native_app(native), native.writer.stop)
