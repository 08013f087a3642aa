"""What serve opens is what was written: a .gguf file beside a manifest is held against it, by name."""

from __future__ import annotations

import pytest

from ray_pipeline.cli.served_model import find_served
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import write_manifest
from tests.evaluation.made_models import EXPORTABLE, save_tokenizer


def test_a_gguf_file_that_was_changed_since_it_was_exported_is_refused_by_name(tmp_path):
    from model.convert.gguf import save_gguf
    from model.init import init_weights
    from model.transformer import Transformer

    model = Transformer(EXPORTABLE)
    init_weights(model, EXPORTABLE, seed=0)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "export" / "model-f16.gguf"
    path.parent.mkdir()
    save_gguf(
        path, EXPORTABLE, model.state_dict(), kind="f16", tokenizer_folder=tokenizer, name="t", licence="mit"
    )  # fmt: skip
    assert find_served(str(path), tmp_path).gguf == path  # nobody's manifest lists it: taken as it is
    write_manifest(path.parent)
    assert find_served(str(path), tmp_path).name == "model-f16"
    changed = bytearray(path.read_bytes())
    changed[-8] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(UserError, match=r"model-f16\.gguf: damaged: its SHA-256 is not the one in the manifest"):
        find_served(str(path), tmp_path)
