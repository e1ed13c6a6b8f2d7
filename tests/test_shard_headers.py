"""Headers of shards behind URLs are read only once per run directory, for any number of workers."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from corpus.sources import webdataset
from corpus.sources.webdataset import WebDataset
from runtime.artefacts import running_in

SHARDS = 20


@pytest.fixture
def shards() -> str:
    """A brace pattern of shards with two images each in fsspec's memory; the last shard is truncated."""
    system, generator = fsspec.filesystem("memory"), np.random.default_rng(1)
    for shard in range(SHARDS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number in range(2):
                picture = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(picture, "PNG")
                caption = f"naïve place {shard} {number}".encode("latin-1")  # not UTF-8
                for suffix, data in ((".png", picture.getvalue()), (".txt", caption), (".xml", b"<a/>")):
                    info = tarfile.TarInfo(f"{shard:02d}-{number}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        data = buffer.getvalue()
        system.pipe(f"/headers/{shard:02d}.tar", data[:2500] if shard == SHARDS - 1 else data)
    yield f"memory://headers/{{00..{SHARDS - 1}}}.tar"
    system.rm("/headers", recursive=True)
    webdataset._seen.clear()


def test_headers_of_known_shards_are_not_read_again(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = WebDataset(shards, resolution=8, workers=0).manifest()
    assert len(first) == 2 * SHARDS and first["id"].is_unique
    webdataset._seen.clear()
    with running_in(tmp_path):
        kept = WebDataset(shards, resolution=8, workers=0).manifest()
        assert len(list((tmp_path / "shards").iterdir())) == SHARDS and not webdataset._seen
        with monkeypatch.context() as patched:
            patched.setattr(webdataset, "_members", lambda *_: pytest.fail("a shard was read again"))
            again = WebDataset(shards, resolution=8, workers=0)
            assert again.manifest().equals(kept) and kept.equals(first)
            assert again.shards_of(np.array([0, 1, 2, 5])) == [f"memory://headers/{n:02d}.tar" for n in (0, 1, 2)]
        [broken, *_] = sorted((tmp_path / "shards").iterdir())
        broken.write_bytes(b"cut")
        assert WebDataset(shards, resolution=8, workers=0).manifest().equals(first), "what is broken is read again"
        assert json.loads(gzip.decompress(broken.read_bytes()))["entries"]


def test_a_changed_shard_is_read_again(shards: str, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    with running_in(tmp_path):
        before = WebDataset(shards, resolution=8, workers=0).manifest()
        system.pipe("/headers/00.tar", system.cat("/headers/01.tar") + b"\0" * 512)
        after = WebDataset(shards, resolution=8, workers=0).manifest()
    assert before["id"][0] != after["id"][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_indexes_local_shards_like_remote_ones(workers: int, shards: str, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for name in system.ls("/headers", detail=False):
        (tmp_path / Path(name).name).write_bytes(system.cat(name))
    local = WebDataset(f"{tmp_path}/{{00..{SHARDS - 1}}}.tar", resolution=8, workers=workers)
    far = WebDataset(shards, resolution=8, workers=0).manifest()
    columns = [name for name in far if name not in ("id", "stamp")]
    assert local.manifest()[columns].equals(far[columns]) and len(local.manifest()) == len(far)
