import json

import numpy as np
import pytest
import torch

from mllmfl_lite import repro


def test_seeds_are_fixed_for_good():
    """Committed results depend on these streams: a change here is a change of every figure."""
    assert repro.stable_seed(0, "batches", 1, 2, 3) == 9125162717315492550
    assert repro.stable_seed(0, "batches", 1, 2, 4) != repro.stable_seed(0, "batches", 1, 2, 3)
    assert repro.torch_generator(1, "a").initial_seed() == repro.stable_seed(1, "a")
    assert repro.numpy_generator(7, "x").integers(1000) == repro.numpy_generator(7, "x").integers(1000)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    repro.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        repro.write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old"


def test_json_refuses_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        repro.write_json(tmp_path / "x.json", {"loss": float("nan")})
    repro.write_json(tmp_path / "x.json", {"loss": 1.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": 1.5}


def test_progress_is_silent_where_nobody_looks(monkeypatch, capsys):
    monkeypatch.delenv("MLLMFL_PROGRESS", raising=False)
    with repro.progress_bar(3, "round", "x") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MLLMFL_PROGRESS", "1")
    with repro.progress_bar(3, "round", "training") as bar:
        bar.update()
    assert "training" in capsys.readouterr().err


def test_devices():
    assert repro.pick_device("cpu") == torch.device("cpu")
    assert repro.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            repro.pick_device("cuda")


def test_generators_do_not_touch_the_global_ones():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.random.get_rng_state()
    repro.torch_generator(3).seed()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"x cannot be written \(.*No space left on device.*\); make room or choose"):
        repro.write_atomically(tmp_path / "x", b"1")
    with pytest.raises(OSError, match=r"none.x cannot be written \(.*No such file or directory"):
        repro.write_atomically(tmp_path / "none" / "x", b"1")
