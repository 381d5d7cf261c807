"""What `convert export --format speculators` writes, as the package reads it; skipped where it is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert.__main__ import main
from tests.support.drafts import imported, published_speculators
from tests.support.tiny_hf import converted, model_of, same, save

speculators = pytest.importorskip("speculators", reason="speculators is not there: pip install speculators")

IDS = np.arange(3, 160, 4)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"norm_before_residual": True},
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
        {"fc_norm": True, "norm_output": True},
    ],
)
def test_the_package_reads_what_we_write_and_we_what_it_writes(entries, tmp_path):
    source = save(model_of(num_hidden_layers=10), tmp_path / "hf")
    ckpt = converted("hf", source, tmp_path / "ckpt")
    folder = published_speculators(tmp_path / "draft", ckpt, IDS, **entries)
    first = imported(folder, ckpt, "first", command="draft")
    out = tmp_path / "out"
    argv = ["export", "--ckpt", ckpt.path, "--format", "speculators", "--dtype", "float32", "--verifier", source]
    main([str(arg) for arg in (*argv, "--out", out)])
    model = speculators.SpeculatorModel.from_pretrained(str(out))
    wanted, found = load_file(out / "model.safetensors"), model.state_dict()
    assert {name for name in found if not name.startswith(("verifier", "rotary"))} == set(wanted)
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in wanted.items())
    assert all(getattr(model.config, name) == value for name, value in entries.items())
    model.save_pretrained(tmp_path / "theirs")
    second = imported(tmp_path / "theirs", ckpt, "second", command="draft")
    assert second[0] == first[0] and same(second[1], first[1])
