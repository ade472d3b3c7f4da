import os

import pytest
import torch

from mllmfl_lite import repro
from mllmfl_lite.checkpoint import CheckpointError, RunFolder

IDENTITY = {"lr": 0.1, "method": {"name": "FedAvg"}}


def tensors(value: float) -> dict:
    return {"w": torch.full((2, 3), value), "steps": torch.tensor(7)}


def test_what_was_saved_is_loaded(tmp_path):
    with RunFolder(tmp_path / "new" / "folder", IDENTITY) as folder:
        assert folder.load() is None
        folder.save(1, tensors(1.0), ["one"])
        folder.save(2, tensors(2.0), ["one", "two"])
        step, loaded, record = folder.load()
    assert step == 2 and record == ["one", "two"]
    assert torch.equal(loaded["w"], tensors(2.0)["w"]) and loaded["steps"].dtype == torch.int64
    assert len(list((tmp_path / "new" / "folder").glob("weights-*"))) == 1


@pytest.mark.parametrize("failing", range(4))
def test_a_crash_between_any_two_steps_leaves_one_whole_checkpoint(tmp_path, monkeypatch, failing):
    """Of the four file operations of a save, let one fail: what loads is the checkpoint before or the one after."""
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.save(1, tensors(1.0), "one")
        calls, real_replace, real_fsync = [], os.replace, os.fsync

        def maybe_fail(real):
            def wrapped(*args):
                calls.append(real)
                if len(calls) == failing + 1:
                    raise OSError("the machine went down")
                return real(*args)

            return wrapped

        monkeypatch.setattr(repro.os, "replace", maybe_fail(real_replace))
        monkeypatch.setattr(repro.os, "fsync", maybe_fail(real_fsync))
        with pytest.raises(CheckpointError, match="went down"):
            folder.save(2, tensors(2.0), "two")
        monkeypatch.undo()
        step, loaded, record = folder.load()
        assert (step, record) == (1, "one") and loaded["w"][0, 0] == 1.0
        folder.save(2, tensors(2.0), "two")
        assert folder.load()[0] == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_weights_are_refused_and_kept(tmp_path, damage):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.save(1, tensors(1.0), None)
        path = next(tmp_path.glob("weights-*"))
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-5] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        before = sorted((p.name, p.stat().st_size) for p in tmp_path.iterdir())
        with pytest.raises(CheckpointError, match=r"weights-000001.safetensors is damaged"):
            folder.load()
        assert before == sorted((p.name, p.stat().st_size) for p in tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", '{"step": 1', "[]", "null", '{"format": 1}', "{}"])
def test_a_damaged_record_is_refused(tmp_path, content):
    with RunFolder(tmp_path, IDENTITY) as folder:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"run.json is damaged"):
            folder.load()


def test_every_flipped_byte_of_the_record_is_found(tmp_path):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.save(12, tensors(1.0), ["one"])
        path = tmp_path / "run.json"
        content = path.read_bytes()
        for place in range(0, len(content) - 1, 3):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            try:
                step, _, record = folder.load()
            except CheckpointError as error:
                assert "run.json is damaged" in str(error) and "remove the folder" in str(error)
            else:
                assert (step, record) == (12, ["one"]), "white space alone"


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.save(1, tensors(1.0), "one")
        monkeypatch.setattr(repro.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"checkpoint 2: .*000002.* cannot be written .*No space left"):
            folder.save(2, tensors(2.0), "two")
        monkeypatch.undo()
        assert folder.load()[0] == 1


def test_a_foreign_checkpoint_names_the_difference(tmp_path):
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.save(1, tensors(1.0), None)
    with (
        RunFolder(tmp_path, {**IDENTITY, "lr": 0.2}) as folder,
        pytest.raises(CheckpointError, match=r"lr: there 0.1, now 0.2"),
    ):
        folder.load()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"), RunFolder(tmp_path / "file", IDENTITY):
        pass
