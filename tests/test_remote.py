"""Shards and results behind URLs: network faults change no result, and no credential is written."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from faulty_store import KEY, SECRET, Fault, Store, running_store
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from test_sources import encoded, shard, texture

from corpus import remote
from corpus.decoding import UNREACHABLE
from corpus.index import Corpus, index_corpus
from corpus.remote import Access, RemoteFile, Target, copy_folder, stretches_of
from corpus.sources import webdataset
from corpus.sources.webdataset import CUT, WebDataset
from runtime.artefacts import COMPLETE, fingerprint, plain, read_json
from runtime.command_line import refuse_unknown
from runtime.errors import UserError
from runtime.notices import notice
from runtime.provenance import resolved
from runtime.redaction import hide, public, redacted
from scripts.export import main as export_main

pytest.importorskip(
    "moto.server", reason="moto or flask, the S3 server on loopback, is not installed", exc_type=ImportError
)
pytest.importorskip("s3fs", reason="s3fs, fsspec's driver of S3, is not installed: the extra `remote` has it")

ROOT = Path(__file__).resolve().parent.parent
SIDE, IMAGES = 16, 10


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of ten images each with captions, metadata, and copies across shards."""
    root = tmp_path_factory.mktemp("shards")
    for number in range(3):
        members: list[tuple[str, bytes]] = []
        for row in range(number * IMAGES, (number + 1) * IMAGES):
            members += [
                (f"s{row:03d}.jpg", encoded(texture(row % 27, side=128), "JPEG", quality=95)),
                (f"s{row:03d}.txt", f"caption {row}".encode()),
                (f"s{row:03d}.json", json.dumps({"scene": f"scene{row % 3}", "lon": row * 10.0}).encode()),
            ]
        shard(root / f"part-{number}.tar", members)
    return root


@pytest.fixture
def store(server: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The server with the shards in s3://tiles/set, no faults, and a client with short time-outs."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    webdataset._seen.clear()
    notice.cache_clear()
    server.faults.clear()
    system, _ = remote.opened_system("s3://tiles", Access(storage=server.storage))
    if not system.exists("tiles"):
        system.mkdir("tiles")
    for path in sorted(folder.glob("*.tar")):
        system.put_file(str(path), f"tiles/set/{path.name}", ACL="public-read")
    server.seen.clear()
    return server


def source(store: Store, urls: str = "s3://tiles/set/part-{0..2}.tar", **options: object) -> WebDataset:
    given = {"resolution": SIDE, "workers": 1, "storage": store.storage, "retries": 3, "timeout": 1.0, **options}
    return WebDataset(urls, **given)


def same(result: Corpus, expected: Corpus) -> None:
    """Equal bit for bit, except for the stamps of the shards."""
    assert (result.directory / "images.npy").read_bytes() == (expected.directory / "images.npy").read_bytes()
    pd.testing.assert_frame_equal(result.manifest.drop(columns="stamp"), expected.manifest.drop(columns="stamp"))


# ---------------------------------------------------------------------------------------------- reading with faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, ""),
        (Fault("busy", times=3), "status 503 3"),
        (Fault("busy", "HEAD", times=2), "status 503 2"),
        (Fault("late", times=1), "time-out 1"),
        (Fault("slow"), ""),
        (Fault("cut", times=2), "ended early 2"),
        (Fault("lost", times=2), "no connection 1"),  # aiohttp itself repeats the request once
        (Fault("whole"), ""),
    ],
    ids=lambda value: f"{value.kind}-{value.method}" if isinstance(value, Fault) else None,
)
@pytest.mark.parametrize("split", ["all", "train"])
def test_transient_faults_do_not_change_the_corpus(
    store: Store,
    folder: Path,
    tmp_path: Path,
    fault: Fault | None,
    message: str,
    split: str,
    capsys: pytest.CaptureFixture,
) -> None:
    expected = index_corpus(WebDataset(str(folder), resolution=SIDE, workers=1, split=split), tmp_path / "here")
    store.faults += [replace(fault)] if fault else []
    capsys.readouterr()
    result = index_corpus(source(store, split=split), tmp_path / "there")
    same(result, expected)
    lines = [line for line in capsys.readouterr().err.splitlines() if "requests were repeated" in line]
    assert [line.partition("repeated: ")[2] for line in lines] == ([message] if message else [])


def test_remote_deep_images_equal_local_ones(store: Store, tmp_path: Path) -> None:
    """A sample of them determines the stretch; it is read from the shards before the others."""
    here = tmp_path / "deep"
    here.mkdir()
    generator = np.random.default_rng(0)
    pixels = [Image.fromarray(generator.integers(0, 3000 + 500 * row, (48, 48), dtype=np.uint16)) for row in range(12)]
    shard(here / "deep.tar", [(f"{row}.png", encoded(image)) for row, image in enumerate(pixels)])
    system, _ = remote.opened_system("s3://tiles", Access(storage=store.storage))
    system.put_file(str(here / "deep.tar"), "tiles/deep/deep.tar")
    expected = index_corpus(WebDataset(str(here), resolution=SIDE, split="all", workers=1), tmp_path / "here")
    store.faults += [Fault("busy", times=2), Fault("cut", times=1)]
    result = index_corpus(source(store, "s3://tiles/deep/", split="all"), tmp_path / "there")
    same(result, expected)
    assert len(np.unique(result.images)) > 50


def test_splits_equal_those_of_local_shards_and_each_shard_is_read_once(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        here = WebDataset(str(folder), resolution=SIDE, split=split, val_fraction=0.3, test_fraction=0.3)
        there = source(store, split=split, val_fraction=0.3, test_fraction=0.3)
        assert there.manifest()["id"].tolist() == here.manifest()["id"].tolist()
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    parts = store.requested("GET")
    assert sum(stop - start for start, stop in parts) <= 1.02 * size


def test_each_shard_needs_one_metadata_request_and_two_reads(store: Store, folder: Path, tmp_path: Path) -> None:
    """For a shard of 30 members: one metadata request, one read of its headers, one read of its adjacent images."""
    index_corpus(source(store, split="all"), tmp_path)
    assert len(store.requested("HEAD")) == 3
    parts = store.requested("GET")
    assert len(parts) == 6, parts
    assert sum(stop - start for start, stop in parts) <= 2 * sum(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.mark.parametrize(
    "urls", ["s3://tiles/set/", "s3://tiles/set", "s3://tiles/set/*.tar", "s3://tiles/set/part-?.tar"]
)
def test_folder_urls_and_patterns_list_the_same_shards(store: Store, folder: Path, urls: str) -> None:
    result = source(store, urls)
    assert result.files == [f"s3://tiles/set/{path.name}" for path in sorted(folder.glob("*.tar"))]
    listed, looked = result.version, source(store).version
    assert listed == looked  # a listing has the same tag as a metadata request


@pytest.mark.parametrize(
    "urls", ["s3://tiles/none/", "s3://tiles/set/x-*.tar", "s3://tiles/set/x.tar", "s3://gone/a.tar"]
)
def test_a_missing_shard_gives_a_one_line_error_without_retries(store: Store, urls: str) -> None:
    with pytest.raises(UserError, match=r"there is no shard s3://") as caught:
        _ = source(store, urls).version
    assert "\n" not in str(caught.value)
    assert len(store.seen) <= 4


def test_original_bytes_of_members_equal_those_of_local_shards(store: Store, folder: Path) -> None:
    here, there = WebDataset(str(folder), split="all"), source(store, split="all")
    rows = np.array([0, 7, 19, 20])
    assert list(there.originals(rows)) == list(here.originals(rows))


# --------------------------------------------------------------------------------------------- permanent faults


@pytest.mark.parametrize("at", [100_000, 3])
def test_a_truncated_object_is_read_like_a_truncated_local_shard(
    store: Store, folder: Path, tmp_path: Path, at: int
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for number in range(3):
        data = (folder / f"part-{number}.tar").read_bytes()
        (cut / f"part-{number}.tar").write_bytes(data[: at if number == 1 else None])
    store.faults.append(Fault("cut", path=r".*part-1\.tar", at=at))
    result = index_corpus(source(store, split="all"), tmp_path / "there")
    expected = index_corpus(WebDataset(str(cut), resolution=SIDE, split="all", workers=1), tmp_path / "here")
    assert (np.asarray(result.images) == np.asarray(expected.images)).all()
    columns = ["scene", "caption", "readable", "reason"]
    pd.testing.assert_frame_equal(result.manifest[columns], expected.manifest[columns])
    ids = expected.manifest["id"].str.replace(str(cut), "s3://tiles/set", regex=False)
    assert result.manifest["id"].tolist() == ids.tolist()
    assert (~result.readable).any()


def test_a_member_truncated_after_the_headers_were_read_gets_a_reason(store: Store, tmp_path: Path) -> None:
    there = source(store, split="all")
    there.manifest()
    place = there._items[14].image
    store.faults.append(Fault("cut", path=r".*part-1\.tar", at=place.start, until=place.end))
    result = index_corpus(there, tmp_path)
    assert result.manifest["reason"].tolist() == [CUT if row == 14 else "" for row in range(30)]


def test_an_unreachable_image_is_quarantined_and_requested_again_later(
    store: Store, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = index_corpus(WebDataset(str(folder), resolution=SIDE, split="all", workers=1), tmp_path / "here")
    there = source(store, split="all", retries=1)
    there.manifest()
    place = there._items[14].image
    store.faults.append(Fault("busy", path=r".*part-1\.tar", at=place.start, until=place.end))
    result = index_corpus(there, tmp_path)
    assert result.manifest["reason"].tolist() == [UNREACHABLE if row == 14 else "" for row in range(30)]
    assert f"1 of 30 images quarantined: {UNREACHABLE} 1" in capsys.readouterr().err

    store.faults.clear()
    store.seen.clear()
    again = index_corpus(source(store, split="all"), tmp_path)
    assert again.fingerprint != result.fingerprint
    same(again, expected)
    assert store.requested("GET") == [(place.start, place.end)]  # the others are reused
    assert index_corpus(source(store, split="all"), tmp_path).fingerprint == again.fingerprint


def test_a_permanently_unreachable_image_gives_a_stable_fingerprint(store: Store, tmp_path: Path) -> None:
    there = source(store, split="all", retries=0)
    there.manifest()
    place = there._items[14].image
    store.faults.append(Fault("busy", path=r".*part-1\.tar", at=place.start, until=place.end))
    names = [index_corpus(source(store, split="all", retries=0), tmp_path).fingerprint for _ in range(6)]
    assert len(set(names)) == 4 and len(set(names[3:])) == 1


def test_a_network_failure_ends_the_run_and_a_later_run_resumes(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corpus.index.CHUNK", 5)
    expected = index_corpus(WebDataset(str(folder), resolution=SIDE, split="all", workers=1), tmp_path / "here")
    there = source(store, split="all", retries=1)
    there.manifest()
    gone = Fault("lost", path=r".*part-[12]\.tar")
    store.faults.append(gone)
    with pytest.raises(UserError, match=r"part-1\.tar: no connection, after all retries: run the same command again"):
        index_corpus(there, tmp_path / "there")
    gone.times = 0
    store.seen.clear()
    same(index_corpus(source(store, split="all"), tmp_path / "there"), expected)
    assert not store.requested("GET", r".*part-0\.tar")  # its chunks were done


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("busy", "HEAD"), "status 503"),
        (Fault("late", "HEAD"), "time-out"),
        (Fault("lost", "HEAD"), "no connection"),
        (Fault("busy", "GET"), "status 503"),
    ],
    ids=lambda value: f"{value.kind}-{value.method}" if isinstance(value, Fault) else None,
)
def test_an_unreachable_shard_gives_a_one_line_error(store: Store, tmp_path: Path, fault: Fault, reason: str) -> None:
    store.faults.append(replace(fault))
    with pytest.raises(UserError, match=rf"s3://tiles/set/part-\d\.tar cannot be opened .*{reason}") as caught:
        index_corpus(source(store, retries=1, timeout=0.4), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unreachable_server_gives_a_user_error(tmp_path: Path) -> None:
    storage = {"endpoint_url": "http://127.0.0.1:9", "key": KEY, "secret": SECRET}
    with pytest.raises(UserError, match="cannot be opened"):
        _ = WebDataset("s3://tiles/a.tar", storage=storage, retries=0, timeout=1).version


def test_the_error_about_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"Install s3fs to access S3\): pip install '\.\[remote\]'"):
        _ = WebDataset("s3://tiles/a.tar").version


def test_an_unreachable_file_of_class_names_ends_the_indexing(store: Store, tmp_path: Path) -> None:
    """A network fault there would change how all images are shown, or the names of all scenes."""
    store.faults.append(Fault("busy", "HEAD", r".*classnames\.txt"))
    with pytest.raises(UserError, match=r"classnames\.txt: status 503"):
        index_corpus(source(store, retries=1), tmp_path)


# ------------------------------------------------------------------------------------------------- the file itself


@given(
    parts=st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 150_000)), min_size=1, max_size=12),
    planned=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_remote_files_return_the_right_bytes_for_any_reads(parts: list[tuple[int, int]], planned: bool) -> None:
    import fsspec

    data = np.random.default_rng(1).bytes(400_000)
    fsspec.filesystem("memory").pipe_file("/remote/file", data)
    ranges = [(start, min(len(data), start + count)) for start, count in parts]
    plan = stretches_of([part for part in ranges if part[1] > part[0]]) if planned else ()
    file = RemoteFile("memory://remote/file", Access(), len(data), plan)
    for start, count in parts:
        file.seek(start)
        assert file.read(count) == data[start : start + count]
        assert file.tell() == min(len(data), start + count)


def test_stretches_contain_all_parts_and_are_fewer() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        starts = generator.integers(0, 2**27, 40)
        parts = [
            (int(start), int(start + size))
            for start, size in zip(starts, generator.integers(1, 2**21, 40), strict=True)
        ]
        joined = stretches_of(parts)
        assert all(any(start <= a and b <= end for start, end in joined) for a, b in parts)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(joined))  # in order, without overlap
        assert len(joined) < len(parts)


def test_passing_trouble_separates_transient_from_permanent_errors() -> None:
    import aiohttp

    s3 = pytest.importorskip("botocore.exceptions")

    def client(status: int, code: str = "") -> Exception:
        return s3.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

    def caused(error: Exception, cause: Exception) -> Exception:
        error.__cause__ = cause
        return error

    answer = lambda status: aiohttp.ClientResponseError(None, (), status=status)  # noqa: E731
    passing = [
        TimeoutError(), ConnectionResetError(), client(503, "SlowDown"), client(500), client(429), answer(502),
        s3.EndpointConnectionError(endpoint_url="x"), s3.ReadTimeoutError(endpoint_url="x"),
        aiohttp.ClientPayloadError(),
        aiohttp.ServerDisconnectedError(), caused(FileNotFoundError("x"), answer(503)),
        caused(OSError(16, "x"), client(503)),
    ]  # fmt: skip
    lasting = [
        FileNotFoundError(), PermissionError(), client(403), client(404), answer(401), ValueError(),
        caused(FileNotFoundError("x"), answer(404)), OSError(28, "no space"),
    ]  # fmt: skip
    assert [remote.passing_trouble(error) is not None for error in passing] == [True] * len(passing)
    assert [remote.passing_trouble(error) for error in lasting] == [None] * len(lasting)


# ---------------------------------------------------------------------------------------------------- plain HTTP


def test_credentials_in_http_urls_are_neither_stored_nor_fingerprinted(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    host = f"127.0.0.1:{store.port}/tiles/set"
    bare = WebDataset(f"http://{host}/part-{{0..2}}.tar", resolution=SIDE, workers=1, split="all", retries=1)
    named = WebDataset(
        f"http://someone:pa55word@{host}/part-{{0..2}}.tar?token=abcdef", resolution=SIDE, workers=1, split="all"
    )
    assert bare.version == named.version and fingerprint(source=bare) == fingerprint(source=named)
    expected = index_corpus(WebDataset(str(folder), resolution=SIDE, split="all", workers=1), tmp_path / "here")
    same(index_corpus(named, tmp_path / "there"), expected)
    for path in (tmp_path / "there").rglob("*"):
        assert path.is_dir() or not any(text in path.read_bytes() for text in (b"pa55word", b"abcdef"))


def test_http_errors_and_missing_files_are_distinguished(store: Store, tmp_path: Path) -> None:
    """fsspec reports all of them as a missing file."""
    url = f"http://127.0.0.1:{store.port}/tiles/set/part-0.tar"
    store.faults += [Fault("busy", "HEAD", times=1), Fault("busy", "GET", times=1)]
    assert WebDataset(url, retries=2).version
    store.faults += [Fault("busy", "HEAD"), Fault("busy", "GET")]
    with pytest.raises(UserError, match=r"cannot be opened .*status 503"):
        _ = WebDataset(url, retries=1).version
    store.faults.clear()
    with pytest.raises(UserError, match="there is no shard"):
        _ = WebDataset(url.replace("part-0", "part-9"), retries=1).version


# --------------------------------------------------------------------------------------------------- credentials

WORD = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789", min_size=6, max_size=12)
TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789+/=-_~.", min_size=8, max_size=40).map(
    lambda t: f"Zq{t}"
)
QUERIES = st.sampled_from(
    ["X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "sig", "token", "access_token",
     "api_key", "Signature", "AWSAccessKeyId", "password", "apikey", "key", "client_secret"]
)  # fmt: skip


@given(
    scheme=st.sampled_from(["https", "http", "s3", "ftp", "gs"]), user=WORD, secret=TOKEN, name=QUERIES, path=WORD,
    before=st.booleans(), after=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_no_credential_is_left_in_a_url(
    scheme: str, user: str, secret: str, name: str, path: str, before: bool, after: bool
) -> None:
    others = ["versionId=3"] * before, ["part=1"] * after
    query = "&".join([*others[0], f"{name}={secret}", *others[1]])
    bare = f"{scheme}://host.example/{path}/{{0..3}}.tar"
    clean = "&".join([*others[0], *others[1]])
    expected = f"{bare}?{clean}" if clean else bare
    for url in (f"{bare}?{query}", f"{scheme}://{user}:{secret}@host.example/{path}/{{0..3}}.tar?{query}"):
        assert public(url) == expected
        assert public(f"{url}::{url}") == f"{expected}::{expected}"
        assert plain({"urls": [url]}) == {"urls": [expected]}
        message = f"cannot open '{url}' ({url}), see {url}"
        assert secret not in redacted(message) and redacted(message).count(bare) == 3
    assert public(expected) == expected


@pytest.mark.parametrize(
    "text",
    ["https://h:8080/a@b.tar", "abfs://container@account.dfs.core.windows.net/x.tar", "s3://b/x.tar?versionId=3",
     "s3://bucket/{a,b}*.tar", "sftp://me@host/x.tar", "hf://datasets/o/n@main/x", "gs://b/a:b@c.tar", "github://o:r@v1/x",
     "http://h/x?page=2&expires=soon", "/data/token=1/a.tar", "memory://b/x.tar", "https://h:80/x:y@z.tar", "a:b@c"],
)  # fmt: skip
def test_urls_without_credentials_are_unchanged(text: str) -> None:
    assert public(text) == text


def test_messages_hide_named_and_known_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(["hunter2hunter2"])
    monkeypatch.setenv("MY_API_KEY", "from-the-environment")
    message = redacted(
        "corpus.storage.secret=abc123 storage={key:AKIA,secret:xyz} 'token': 'ttt', hunter2hunter2 Bearer abcdefghij "
        "from-the-environment max_tokens=77"
    )
    for secret in ("abc123", "AKIA", "xyz", "ttt", "hunter2", "abcdefghij", "from-the-environment"):
        assert secret not in message
    assert "max_tokens=77" in message and "corpus.storage.secret=***" in message


def test_fingerprints_contain_no_storage_options_and_configs_no_secrets() -> None:
    one = WebDataset("s3://b/a.tar", storage={"key": "K1", "secret": "S1"}, retries=1, timeout=3)
    assert plain(one) == plain(WebDataset("s3://b/a.tar")) and "S1" not in repr(one)
    text = """
    storage: {endpoint_url: "http://u:pw12@h", key: K1, secret: S1,
              client_kwargs: {region_name: x, aws_session_token: S2}}
    reference: {source: {_target_: corpus.sources.webdataset.WebDataset, urls: "s3://K1:S1@b/a", storage: "${storage}"}}
    copy_to: https://h/x?sig=S1
    """
    cfg = OmegaConf.create(text)
    noted = json.dumps(resolved(cfg))
    for secret in ("K1", "S1", "S2", "pw12"):
        assert secret not in noted and secret not in json.dumps(plain(cfg.reference))
    assert json.loads(noted)["storage"] == {"endpoint_url": "http://h", "client_kwargs": {"region_name": "x"}}
    assert plain(cfg.reference)["source"] == {"_target_": "corpus.sources.webdataset.WebDataset", "urls": "s3://b/a"}


def test_refused_arguments_are_reported_without_credentials(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="give options such as -m first") as caught:
        refuse_unknown(["runs=x", "-m", "storage={key:Zq1234,secret:Zq5678}", "seed=1"])
    assert "Zq" not in redacted(str(caught.value)) and capsys.readouterr().err == ""
    refuse_unknown(["-m", "runs=x", "seed=1"])


@pytest.mark.slow
def test_several_workers_index_the_same_corpus_as_one(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("corpus.index.CHUNK", 5)
    expected = index_corpus(WebDataset(str(folder), resolution=SIDE, split="all", workers=1), tmp_path / "here")
    there = source(store, split="all", workers=2)
    there.manifest()
    store.faults.append(Fault("busy", times=2))
    same(index_corpus(there, tmp_path / "there"), expected)
    assert "2 requests were repeated: status 503 2" in capsys.readouterr().err


def test_keys_in_an_s3_url_open_it(store: Store) -> None:
    from urllib.parse import quote

    storage = {"endpoint_url": store.url}
    named = source(store, f"s3://{KEY}:{quote(SECRET, safe='')}@tiles/set/", storage=storage)
    assert named.version == source(store).version
    assert plain(named)["urls"] == "s3://tiles/set/"
    assert SECRET not in json.dumps(named.manifest().to_dict()) and len(named.manifest()) > 20


def test_the_error_about_bad_credentials_does_not_contain_them(store: Store, tmp_path: Path) -> None:
    storage = {**store.storage, "key": "AKIABADBADBADBADBAD0", "secret": "bad+secret/bad"}
    with pytest.raises(UserError, match=r"no permission, or no credentials.*AWS_ACCESS_KEY_ID") as caught:
        index_corpus(source(store, storage=storage), tmp_path)
    assert "BADBAD" not in str(caught.value) and "bad+secret" not in str(caught.value)
    assert len(store.seen) <= 3  # not requested again


# ------------------------------------------------------------------------------------------------- results to a URL


@pytest.fixture
def result(tmp_path: Path) -> Path:
    directory = tmp_path / "selection" / "abc"
    directory.mkdir(parents=True)
    for name in ("a.bin", "deep/b.bin", "stage.json", "summary.json"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps({"fingerprint": "abc", "name": name}))
    return directory


def copy(result: Path, target: Target, name: str = "abc") -> None:
    copy_folder(result, target, {"fingerprint": name}, (COMPLETE, "summary.json"))


@pytest.mark.parametrize("fault", [None, Fault("busy", "PUT", ".*", 3), Fault("lost", "PUT", ".*", 2)], ids=str)
def test_a_copy_is_complete_and_its_summary_is_written_last(
    store: Store, result: Path, fault: Fault | None, tmp_path: Path
) -> None:
    prefix = f"s3://tiles/{tmp_path.name}"
    target = Target(prefix, Access(retries=3, timeout=2, storage=store.storage), "copy_to")
    store.faults += [replace(fault)] if fault else []
    copy(result, target)
    copy(result, target)  # the same again
    puts = [path.rpartition("/")[2] for method, path, _ in store.seen if method == "PUT"]
    assert [name for name in puts if name.endswith("json")][-1] == "summary.json"
    system, _ = remote.opened_system(prefix, Access(storage=store.storage))
    copied = {name.split("/", 2)[2]: system.cat_file(name) for name in system.find(prefix)}
    assert copied == {
        path.relative_to(result).as_posix(): path.read_bytes() for path in result.rglob("*") if path.is_file()
    }
    with pytest.raises(UserError, match=r"copy_to=s3://tiles/.* is not empty"):
        copy(result, target, "other")


def test_an_interrupted_copy_has_no_summary_and_can_be_resumed(store: Store, result: Path, tmp_path: Path) -> None:
    prefix = f"s3://tiles/{tmp_path.name}"
    target = Target(prefix, Access(retries=1, timeout=2, storage=store.storage), "copy_to")
    broken = Fault("busy", "PUT", r".*b\.bin")
    store.faults.append(broken)
    with pytest.raises(UserError, match=r"copy_to=s3://\S+ cannot be written \(.*status 503"):
        copy(result, target)
    system, _ = remote.opened_system(prefix, Access(storage=store.storage))
    assert not {"summary.json", "stage.json"} & {name.rpartition("/")[2] for name in system.find(prefix)}
    with pytest.raises(UserError, match="not empty"):
        copy(result, target, "other")
    broken.times = 0
    copy(result, target)
    assert system.exists(f"{prefix}/summary.json") and not system.exists(f"{prefix}/{remote.UNDER_WAY}")


def test_a_result_is_copied_to_a_local_folder(result: Path, tmp_path: Path) -> None:
    target = Target(str(tmp_path / "there" / "copy"), Access(), "copy_to")
    copy(result, target)
    copy(result, target)
    names = {path.relative_to(tmp_path / "there" / "copy").as_posix() for path in (tmp_path / "there").rglob("*.*")}
    assert names == {"a.bin", "deep/b.bin", "stage.json", "summary.json"}
    with pytest.raises(UserError, match="not empty"):
        copy(result, target, "other")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://user:pw@h/x?token=Zq1", r"copy_to=https://h/x: HTTP servers do not accept folders"),
        ("s3://no-such-bucket/x", "there is no such bucket"),
    ],
)
def test_targets_that_cannot_be_written_are_refused(store: Store, result: Path, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        copy(result, Target(url, Access(retries=0, storage=store.storage), "copy_to"))


def selection_of(corpus: Corpus, runs: Path) -> Path:
    from runtime.artefacts import stage

    def build(directory: Path) -> None:
        kept = np.arange(len(corpus)) % 3 == 0
        table = pd.DataFrame({"id": corpus.manifest["id"], "kept": kept, "weight": kept.astype(np.float32)})
        table.to_parquet(directory / "selection.parquet", index=False)

    return stage(runs, "selection", {"corpus": corpus.fingerprint}, build)


def export(selection: Path, store: Store, form: str, out: str, results: Path, **more: object) -> None:
    options = {"out": out, "shard_size": 6, "reencode": None}
    cfg = {
        "selection": str(selection),
        "to": form,
        "export": options,
        "results": str(results),
        "storage": store.storage,
    }
    export_main(OmegaConf.create({**cfg, **more}))


@pytest.mark.parametrize("form", ["folder", "webdataset", "list"])
def test_a_remote_export_equals_the_local_export(
    store: Store, tmp_path: Path, form: str, capsys: pytest.CaptureFixture
) -> None:
    """The corpus consists of shards behind a URL, which are opened again with the command's own options."""
    corpus = index_corpus(source(store, split="all"), tmp_path / "runs")
    selection = selection_of(corpus, tmp_path / "runs")
    prefix = f"s3://tiles/{tmp_path.name}/{form}"
    export(selection, store, form, prefix, tmp_path / "results")
    assert capsys.readouterr().out == f"export: {prefix}\n"
    export(selection, store, form, str(tmp_path / "here"), tmp_path / "results")
    system, _ = remote.opened_system(prefix, Access(storage=store.storage))
    result = {name.split("/", 3)[3]: system.cat_file(name) for name in system.find(prefix)}
    metadata = json.loads(result.pop("export.json"))
    assert metadata["to"] == form and metadata["images"] == 10 and metadata["selection"] == selection.name
    here = {
        path.relative_to(tmp_path / "here").as_posix(): path
        for path in (tmp_path / "here").rglob("*")
        if path.is_file()
    }
    assert result == {name: path.read_bytes() for name, path in here.items()}
    assert not list((tmp_path / "results").rglob("*.*"))
    export(selection, store, form, prefix, tmp_path / "results")  # the same again
    with pytest.raises(UserError, match="not empty"):
        export(selection, store, "list" if form == "folder" else "folder", prefix, tmp_path / "results")


def test_an_export_that_cannot_be_uploaded_is_kept_locally(store: Store, tmp_path: Path) -> None:
    corpus = index_corpus(source(store, split="all"), tmp_path / "runs")
    selection, prefix = selection_of(corpus, tmp_path / "runs"), f"s3://tiles/{tmp_path.name}"
    store.faults.append(Fault("busy", "PUT", r".*kept\.txt"))
    with pytest.raises(UserError, match=r"cannot be written .* the export is in .*\.upload") as caught:
        export(selection, store, "list", prefix, tmp_path / "results", corpus={"retries": 1, "timeout": 2})
    (kept,) = (tmp_path / "results").rglob("kept.txt")
    assert str(kept.parent) in str(caught.value)
    with pytest.raises(UserError, match="to=symlinks can link files only on this machine"):
        export(selection, store, "symlinks", prefix, tmp_path / "results")


def test_an_export_of_signed_urls_accepts_new_signatures(store: Store, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{store.port}/tiles/set/part-{{0..2}}.tar"
    old = WebDataset(f"{url}?token=old", resolution=SIDE, workers=1, split="all")
    selection = selection_of(index_corpus(old, tmp_path / "runs"), tmp_path / "runs")
    assert read_json(next((tmp_path / "runs" / "corpus").glob("*/stage.json")))["inputs"]["source"]["urls"] == url
    with pytest.raises(UserError, match=r"unexpected keyword argument 'endpoint_url'"):
        export(selection, store, "list", str(tmp_path / "out"), tmp_path / "results")
    options = {"results": tmp_path / "results", "storage": {}, "corpus": {"urls": f"{url}?token=new"}}
    export(selection, store, "list", str(tmp_path / "out"), **options)
    with pytest.raises(UserError, match="is not the pruned corpus"):
        export(selection, store, "list", str(tmp_path / "o2"), tmp_path / "results", corpus={"urls": "http://h/x.tar"})


# ------------------------------------------------------------------------------------------------------------- commands


def run_command(script: str, tmp_path: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    import os

    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(ROOT), **variables}
    command = [
        sys.executable,
        str(ROOT / script),
        *options,
        f"runs={tmp_path / 'runs'}",
        f"results={tmp_path / 'results'}",
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300, env=environment
    )


def given(tmp_path: Path, done: subprocess.CompletedProcess) -> Iterator[tuple[str, bytes]]:
    yield "stdout", done.stdout.encode()
    yield "stderr", done.stderr.encode()
    for path in tmp_path.rglob("*"):
        yield str(path), str(path).encode()
        if path.is_file():
            yield str(path), path.read_bytes()


@pytest.mark.slow
def test_no_command_writes_or_prints_a_credential(store: Store, tmp_path: Path) -> None:
    corpus = [
        "corpus=webdataset", "corpus.train.resolution=32", "corpus.train.split=all",
        "prune=random", "ratio=0.5", "corpus.retries=1", "tracker=tensorboard",
    ]  # fmt: skip
    bad, worse = "AKIABADBADBADBADBAD0", "bad+secret/badbad"
    at = f"storage={{endpoint_url:'{store.url}'"
    prefix = f"s3://tiles/{tmp_path.name}"
    http = f"http://someone:pa55word@127.0.0.1:{store.port}/tiles/set/part-{{0..2}}.tar?token=Zqt0ken"
    good = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    cases: list[tuple[list[str], dict[str, str], str]] = [
        (
            ["-m", *corpus, "corpus.urls=s3://tiles/set/", f"{at},key:{bad},secret:'{worse}'}}", "seed=1,2"],
            {},
            "no permission, or no credentials",
        ),
        ([*corpus, "corpus.urls=s3://tiles/set/", f"{at}}}", f"copy_to={prefix}"], good, ""),
        ([*corpus, f"corpus.urls={http}"], {}, ""),
    ]
    for arguments, variables, message in cases:
        done = run_command("prune/run.py", tmp_path, *arguments, **variables)
        assert done.returncode == (2 if message else 0) and message in done.stderr, done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        if variables:
            *_, copied, last = done.stdout.splitlines()
            assert copied == f"copied: {prefix}" and last.startswith("selection: ")
        for where, data in given(tmp_path, done):
            for secret in (bad, worse, SECRET, KEY, "pa55word", "Zqt0ken"):
                assert secret.encode() not in data, (where, secret, arguments)
    assert "***" in (tmp_path / "runs" / "multirun.yaml").read_text()
