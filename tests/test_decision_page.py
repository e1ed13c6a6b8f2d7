"""The decision page: numbers by brute force, the server's selections compared with prune's, a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from scipy.ndimage import gaussian_filter

from prune.decisions import ADDED, REMOVED, Decision, Edits, Settings, edited, open_decision
from prune.kept import open_selection
from prune.page_arrays import computed, groups_of
from prune.pool import Selection
from prune.selection import select
from report.decision_page import (
    ATLAS_SIDE,
    Shown,
    Thumbnails,
    bundle,
    decision_page,
    selection_columns,
    thumbnail,
    write_decision_page,
)  # fmt: skip
from runtime.application import CONFIGS
from runtime.artefacts import COMPLETE, read_json
from runtime.errors import UserError
from scripts.page import HOST, Server, Session, checked, content, handler_of, live

EVIL = "<script>evil</script>&\"'.png"
SIZE = 60


def config(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", ["tracker=none", *overrides])


# ---------------------------------------------------------------- neighbours, groups, the nearest kept image


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def points_of(count: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    points = random.normal(size=(8, width))[random.integers(8, size=count)] * 2 + random.normal(size=(count, width))
    points[1:20:2] = points[0:19:2] + random.normal(size=(10, width)) * 0.02  # near-duplicates
    return (points + 3).astype(np.float16)


def test_neighbours_groups_and_nearest_kept_agree_with_brute_force() -> None:
    random = np.random.default_rng(1)
    embeddings, readable = points_of(150, 12), random.random(150) > 0.1
    kept = readable & (random.random(150) < 0.3)
    result = computed(embeddings, readable, kept, random.choice(["a", "b", "c"], 150), 5, 0.98)
    rows = np.flatnonzero(readable)
    centred = np.zeros((150, 12))
    centred[rows] = unit(embeddings[rows].astype(float) - embeddings[rows].astype(float).mean(axis=0))
    cosines = centred @ centred.T
    np.fill_diagonal(cosines, -np.inf)
    cosines[:, ~readable] = -np.inf
    order = np.argsort(-cosines, axis=1)[:, :5]
    assert (result.neighbours[rows] == order[rows]).mean() > 0.995
    expected = np.take_along_axis(cosines, order, axis=1)[rows]
    np.testing.assert_allclose(result.cosines[rows], expected, atol=2e-3)
    np.testing.assert_allclose(
        result.nearest_cosine[rows], np.where(kept, cosines, -np.inf).max(axis=1)[rows], atol=2e-3
    )
    assert kept[result.nearest_kept[rows]].all() and (result.nearest_kept[rows] != rows).all()
    group = np.arange(150)  # merged until nothing changes
    pairs = [(a, b) for a in rows for b in result.neighbours[a] if cosines[a, b] >= 0.98]
    assert len(pairs) >= 10
    for _ in range(150):
        for a, b in pairs:
            group[a] = group[b] = min(group[a], group[b])
    sizes = np.bincount(group[rows], minlength=150)
    alone = np.array([sizes[number] == 1 for number in group])
    assert (result.group[~readable] == -1).all() and ((result.group == -1) == (alone | ~readable)).all()
    together = result.group[:, None] == result.group[None]
    inside = result.group >= 0
    assert (together == (group[:, None] == group[None]))[np.ix_(inside, inside)].all()
    assert result.group[np.flatnonzero(inside)[0]] == 0
    assert np.isnan(result.plane[~readable]).all() and np.isfinite(result.plane[rows]).all()
    assert (result.neighbours[~readable] == -1).all() and np.isnan(result.cosines[~readable]).all()


def test_in_many_dimensions_cosines_are_exact_and_near_duplicates_are_found() -> None:
    embeddings = points_of(900, 200)
    everything = np.ones(900, bool)
    result = computed(embeddings, everything, everything, np.full(900, ""), 4, 0.98)
    vectors = unit(embeddings.astype(float) - embeddings.astype(float).mean(axis=0))
    np.testing.assert_allclose(result.cosines, (vectors[:, None] * vectors[result.neighbours]).sum(axis=2), atol=2e-3)
    best = np.sort(vectors @ vectors.T - 2 * np.eye(900), axis=1)[:, ::-1][:, :4]
    assert (result.cosines[:, 0] >= best[:, 0] - 0.05).mean() > 0.85
    pairs = [tuple(result.group[[at, at + 1]]) for at in range(0, 19, 2)]
    assert all(first == second >= 0 for first, second in pairs)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_images_have_few_neighbours(count: int) -> None:
    everything = np.ones(count, bool)
    result = computed(points_of(30, 12)[:count], everything, everything, np.full(count, "a"), 8, 0.98)
    assert result.neighbours.shape == (count, 8) and (result.neighbours >= 0).sum() == count * max(0, count - 1)
    assert groups_of(np.empty((0, 3), int), np.empty((0, 3)), np.empty(0, int), 0.9).shape == (0,)


# ---------------------------------------------------------------- content of the page


def unpacked(data: bytes, header: list[dict]) -> dict:
    block, types = gzip.decompress(data), {"Uint8Array": "u1", "Uint16Array": "<u2", "Int32Array": "<i4"}
    result = {}
    for column in header:
        start, length = column["start"], column["length"]
        if column["type"] == "json":
            result[column["name"]] = json.loads(block[start : start + length].decode())
        else:
            values = np.frombuffer(block, types.get(column["type"], "<f4"), length, start)
            result[column["name"]] = values if column["width"] == 1 else values.reshape(-1, column["width"])
    return result


def on_page(html: str) -> tuple[dict, dict]:
    """The metadata and the columns of a page."""
    metadata = json.loads(
        re.search(r'<script type="application/json" id="metadata">(.*?)</script>', html, re.DOTALL)[1]
    )
    data = base64.b64decode(re.search(r'<script type="text/plain" id="data">(.*?)</script>', html, re.DOTALL)[1])
    return metadata, unpacked(data, metadata["columns"])


def shown_of(count: int, **columns: np.ndarray) -> Shown:
    random = np.random.default_rng(0)
    scenes = random.choice(["ice", EVIL, ""], count)
    reasons = random.choice(["kept", "redundant", "unreadable", "low_entropy"], count)
    table = pd.DataFrame(
        {"kept": reasons == "kept", "reason": reasons, "scene": scenes, "entropy": random.random(count) * 8,
         "cluster": random.integers(-1, 9, count), "centroid_distance": random.random(count),
         "scene_similarity": random.random(count)}
    )  # fmt: skip
    manifest = pd.DataFrame({"id": [f"{EVIL}{row}" for row in range(count)], "caption": EVIL, **columns})
    images = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    arrays = {"x": random.random(count).astype("f4"), "neighbours": random.integers(0, count, (count, 3)).astype("i4")}
    return Shown(EVIL, {"selection": EVIL}, table, manifest, arrays, images)


def test_the_page_contains_the_selection_and_escapes_user_text() -> None:
    lon, lat = np.linspace(-180, 180, 50), np.linspace(-80, 80, 50)
    lon[3] = np.nan
    shown = shown_of(50, lon=lon, lat=lat)
    html = decision_page(shown, Thumbnails(8, 10, 100), beside=True)
    metadata, columns = on_page(html)
    assert "<script>evil" not in html and html.count("<script") == 4
    assert columns["ids"] == [f"{EVIL}{row}" for row in range(50)]
    assert [columns["captions"][code] for code in columns["captionCodes"]] == [EVIL] * 50
    assert (columns["kept"] == shown.table["kept"]).all()
    for name in ("scene", "reason"):
        assert [metadata[name + "s"][code] for code in columns[name]] == shown.table[name].tolist()
    np.testing.assert_array_equal(columns["entropy"], shown.table["entropy"].to_numpy("f4"))
    np.testing.assert_array_equal(columns["neighbours"], shown.columns["neighbours"])
    assert np.flatnonzero(np.isnan(columns["lon"])).tolist() == [3] == np.flatnonzero(np.isnan(columns["lat"])).tolist()
    np.testing.assert_array_equal(np.delete(columns["lat"], 3), np.delete(lat, 3).astype("f4"))
    readable = np.flatnonzero(shown.table["reason"] != "unreadable")
    assert columns["drawn"].tolist() == readable.tolist() and metadata["beside"] == len(readable)
    assert len(columns["inside"]) == 10 and set(columns["inside"]) <= set(readable)
    assert shown.table["kept"][columns["inside"]].sum() == 5
    assert "lon" not in on_page(decision_page(shown_of(5), Thumbnails(8, 10, 100), beside=False))[1]


def test_thumbnails_are_at_the_positions_that_the_page_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("report.decision_page.ATLAS_SIDE", 4)
    shown = shown_of(60)
    flat = np.random.default_rng(5).integers(0, 256, (60, 1, 1, 3), dtype=np.uint8)
    shown = replace(shown, images=np.broadcast_to(flat, (60, 8, 8, 3)))
    page = write_decision_page(tmp_path / "page", shown, Thumbnails(16, 6, 40))
    metadata, columns = on_page(page.read_text(encoding="utf-8"))
    assert len(columns["drawn"]) == metadata["beside"] == 40 and metadata["side"] == 4
    files = sorted((page.parent / "thumbs").iterdir())
    assert [path.name for path in files] == ["0000.jpg", "0001.jpg", "0002.jpg"]
    sheets = [np.asarray(Image.open(path)).astype(int) for path in files]
    assert [sheet.shape for sheet in sheets] == [(64, 64, 3), (64, 64, 3), (32, 64, 3)]
    for index, row in enumerate(columns["drawn"]):
        top, left = index % 16 // 4 * 16, index % 4 * 16
        tile = sheets[index // 16][top : top + 16, left : left + 16]
        assert abs(tile.mean(axis=(0, 1)) - flat[row, 0, 0]).max() < 6
    html = page.read_text(encoding="utf-8")
    inside = base64.b64decode(re.search(r'<script type="text/plain" id="atlas">(.*?)</script>', html, re.DOTALL)[1])
    assert Image.open(io.BytesIO(inside)).size == (64, 32)
    write_decision_page(tmp_path / "page", shown, Thumbnails(16, 40, 40))
    assert not (page.parent / "thumbs").exists()  # all are inside the file
    assert thumbnail(shown.images[0], 8) is not None and thumbnail(shown.images[0], 3).shape == (3, 3, 3)
    assert ATLAS_SIDE**2 * 48**2 * 3 < 20_000_000


def test_a_bundle_is_reproducible_and_unpacks_to_its_columns() -> None:
    columns = {"a": np.arange(3, dtype=np.uint8), "b": np.arange(4, dtype=np.float32), "c": np.eye(2, dtype=np.int32)}
    header, data = bundle(columns, {"t": ["é", "\ud800"]})
    result = unpacked(data, header)
    assert result["t"] == ["é", "?"] and bundle(columns, {"t": ["é", "\ud800"]})[1] == data
    for name, values in columns.items():
        np.testing.assert_array_equal(result[name], values)


# ---------------------------------------------------------------- another selection, by hand and by the method


def landscape(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    smooth = gaussian_filter(random.normal(size=(32, 32, 3)), (1 + seed % 4, 1 + seed % 4, 0))
    return np.clip(smooth / smooth.std() * (5 + seed % 30) + random.integers(60, 190, 3), 0, 255).astype(np.uint8)


OPTIONS = (
    "corpus=folder", "corpus.workers=1", "corpus.train.split=all", "corpus.train.resolution=32", "leaks=0",
    "reference=none", "prune=rsprune", "prune.images_per_cluster=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection of 60 images with awkward names and places."""
    root = tmp_path_factory.mktemp("page")
    (root / "images").mkdir()
    rows = []
    for number in range(SIZE):
        name = f"{number:02d}.png" if number else "<b>x<b>.png"
        Image.fromarray(landscape(number)).save(root / "images" / name)
        rows.append({"file_name": name, "caption": f"number {number}", "lon": number * 2.0 - 60, "lat": number - 30.0})
    (root / "images" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "images" / "broken.png").write_bytes(b"none")
    return select(config_of(root, "ratio=0.5"), "rsprune")[0]


def config_of(root: Path, *overrides: str):
    return config(
        f"corpus.root={root / 'images'}", f"runs={root / 'runs'}", f"results={root / 'results'}", *OPTIONS, *overrides
    )


def root_of(made: Path) -> Path:
    return made.parent.parent.parent


@pytest.fixture(scope="module")
def decision(made: Path) -> Decision:
    return open_decision(open_selection(made))


@pytest.fixture(scope="module")
def session(made: Path, decision: Decision) -> Session:
    cfg = config_of(root_of(made), f"selection={made}")
    shown, thumbnails = content(cfg, decision)
    return Session(cfg, decision, decision_page(shown, thumbnails, beside=False))


def state(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("overrides", [("ratio=0.5",), ("ratio=0.8",), ("ratio=0.8", "prune.uniformity=0.0")])
def test_selecting_again_on_the_page_equals_prune_bit_for_bit(made: Path, session: Session, overrides: tuple) -> None:
    expected = pd.read_parquet(select(config_of(root_of(made), *overrides), "rsprune")[0] / "selection.parquet")
    given = {name.rpartition(".")[2]: float(value) for name, _, value in (text.partition("=") for text in overrides)}
    answer = session.select(given)
    columns = unpacked(base64.b64decode(answer["data"]), answer["columns"])
    for name, values in selection_columns(expected).items():
        np.testing.assert_array_equal(columns[name], values)
    assert answer["scenes"] == sorted(set(expected["scene"])) and answer["reasons"] == sorted(set(expected["reason"]))
    selection = session.selection(Settings.of(given))
    for name in ("reason", "scene", "scene_similarity", "cluster", "centroid_distance"):
        np.testing.assert_array_equal(getattr(selection, name), expected[name].to_numpy())
    assert answer["seconds"] >= 0 and json.dumps(answer)


def test_images_moved_by_hand_are_saved_as_a_new_selection(made: Path, session: Session, tmp_path: Path) -> None:
    before, table = state(made), pd.read_parquet(made / "selection.parquet")
    readable = table["reason"] != "unreadable"
    added = np.flatnonzero(~table["kept"] & readable)[[0, 3]].tolist()
    removed = np.flatnonzero(table["kept"])[[1, 2, 4]].tolist()
    answer = session.export({"added": added, "removed": removed, "to": "list"})
    directory = Path(answer["selection"])
    result, summary = pd.read_parquet(directory / "selection.parquet"), read_json(directory / "summary.json")
    expected = table["kept"].copy()
    expected[added], expected[removed] = True, False
    assert result["kept"].tolist() == expected.tolist()
    assert (result["reason"][added] == ADDED).all() and (result["reason"][removed] == REMOVED).all()
    untouched = [row for row in range(len(table)) if row not in added + removed]
    assert (result["reason"][untouched] == table["reason"][untouched]).all()
    assert summary["by_hand"]["selection"] == made.name and summary["kept"] == expected.sum()
    assert summary["by_hand"]["added"] == 2 and summary["by_hand"]["removed"] == 3
    assert result["weight"].sum() == readable.sum() and (result["weight"] > 0).tolist() == expected.tolist()
    ids = (Path(answer["export"]) / "kept.txt").read_text(encoding="utf-8").splitlines()
    assert ids == table["id"][expected].tolist()
    assert state(made) == before and directory != made
    assert session.export({"added": added, "removed": removed, "to": "list"}) == answer  # again: nothing new is written
    again = open_decision(open_selection(directory))  # and a page can be made for it as well
    assert again.as_it_stands().kept.tolist() == np.flatnonzero(expected).tolist()
    assert again.kept.inputs["by_hand"]["removed"] == table["id"][removed].tolist()


def test_saving_without_a_change_returns_the_opened_selection(made: Path, session: Session) -> None:
    assert session.save({}) == {"selection": str(made)}
    assert session.save({"ratio": 0.5, "uniformity": 1.0, "added": [], "removed": []}) == {"selection": str(made)}
    other = Path(session.save({"ratio": 0.75, "uniformity": 0.5})["selection"])
    inputs = read_json(other / COMPLETE)["inputs"]
    assert inputs["ratio"] == 0.75 and inputs["method"]["uniformity"] == 0.5
    assert read_json(other / "summary.json")["kept"] == 61 - round(0.75 * 61)


def test_invalid_requests_and_options_are_refused(made: Path, decision: Decision, session: Session) -> None:
    kept = np.flatnonzero(decision.table["kept"]).tolist()
    unreadable = np.flatnonzero(decision.table["reason"] == "unreadable").tolist()
    for given, text in (
        ({"ratio": 1.0}, "not a number in"), ({"ratio": "x"}, "not a number in"), ({"uniformity": 2}, "outside"),
        ({"uniformity": True}, "outside"), ({"added": "x"}, "list"), ({"added": [0.5]}, "list"),
        ({"removed": [0, 0]}, "list"), ({"removed": [10**9]}, "list"), ({"added": [-1]}, "list"),
        ({"added": kept[:1]}, "is kept already"), ({"removed": unreadable}, "is not kept"),
        ({"added": unreadable}, "cannot be read"), ({"removed": kept}, "no image is left"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text) as error:
            session.save(given)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="to=zip is unknown"):
        session.export({"to": "zip"})
    fixed = replace(decision, method=None, fixed="the method reads captions")
    with pytest.raises(UserError, match="reads captions"):
        fixed.select(Settings(0.5))
    with pytest.raises(UserError, match="has no uniformity"):
        replace(decision, method=object()).select(Settings(0.5, 0.3))
    for option in ("port=0", "port=x", "tile=2", "neighbours=0", "embedded=true", "duplicate=2", "thumbnails=null"):
        with pytest.raises(UserError, match=f"page.{option.partition('=')[0]}="):
            checked(config(f"page.{option}"))


def test_a_stage_that_names_a_class_outside_the_methods_is_refused(made: Path) -> None:
    kept = open_selection(made)
    for method in (
        {"_class_": "subprocess.Popen", "args": "ls"},
        {"_target_": "os.system", "_class_": "prune.methods.x"},
    ):
        with pytest.raises(UserError, match="is not a pruning method"):
            open_decision(replace(kept, inputs={**kept.inputs, "method": method}))


def test_a_selection_of_another_version_is_refused(made: Path) -> None:
    kept = open_selection(made)
    method = {**kept.inputs["method"], "renamed_since": 0.5}
    with pytest.raises(UserError, match=r"another version of this project \(.*renamed_since.*\): prune again"):
        open_decision(replace(kept, inputs={**kept.inputs, "method": method}))


def test_edits_do_not_change_the_original_selection() -> None:
    selection = Selection(
        np.array([0, 2]), np.array(["kept", "redundant", "kept"], object), *(np.zeros(3) for _ in range(4))
    )
    rows = Edits.of({"added": [1], "removed": [2]}, 3)
    result = edited(selection, rows, np.ones(3, bool), ["a", "b", "c"])
    assert result.kept.tolist() == [0, 1] and result.reason.tolist() == ["kept", ADDED, REMOVED]
    assert selection.kept.tolist() == [0, 2] and selection.reason.tolist() == ["kept", "redundant", "kept"]
    assert rows and not Edits.of({}, 3)


# ---------------------------------------------------------------- the server


def test_a_disconnected_browser_is_not_reported_as_an_error(capfd: pytest.CaptureFixture) -> None:
    server = Server((HOST, 0), type("Handler", (), {}))
    for error, message in ((BrokenPipeError(), False), (ZeroDivisionError(), True)):
        try:
            raise error
        except Exception:
            server.handle_error(None, (HOST, 1))
        assert bool(capfd.readouterr().err) == message
    server.server_close()


@contextmanager
def serving(session: Session) -> Iterator[int]:
    server = Server((HOST, 0), handler_of(session))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def requested(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    result = answer.status, answer.read()
    connection.close()
    return result


def test_the_server_refuses_unknown_paths_and_requests_from_other_sites(session: Session, decision: Decision) -> None:
    with serving(session) as port:
        status, page = requested(port, "GET", "/")
        assert status == 200 and page == session.page and b'data-live="{&quot;ratio' in page
        status, image = requested(port, "GET", "/image/7.png")
        assert status == 200
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), decision.kept.corpus.images[7])
        for path in ("/image/999.png", "/image/-1.png", "/../stage.json", "/thumbs/0000.jpg"):
            assert requested(port, "GET", path)[0] == 404
        assert requested(port, "GET", "/", Host="evil.example")[0] == 403
        good = json.dumps({"ratio": 0.8, "uniformity": 1.0}).encode()
        status, answer = requested(port, "POST", "/api/select", good, X_Page="1")
        expected = session.selection(Settings(0.8, 1.0))
        columns = unpacked(base64.b64decode(json.loads(answer)["data"]), json.loads(answer)["columns"])
        assert status == 200 and np.flatnonzero(columns["kept"]).tolist() == expected.kept.tolist()
        assert requested(port, "POST", "/api/select", good)[0] == 403  # like a form from another site
        assert requested(port, "POST", "/api/select", good, X_Page="1", Host=f"evil.example:{port}")[0] == 403
        assert requested(port, "POST", "/api/delete", good, X_Page="1")[0] == 404
        for body in (b"{", b"[]", json.dumps({"ratio": 7}).encode()):
            status, answer = requested(port, "POST", "/api/select", body, X_Page="1")
            assert status == 400 and "\n" not in json.loads(answer)["error"]


def test_the_page_receives_the_options_that_can_be_changed(decision: Decision) -> None:
    html = live('<!doctype html>\n<html lang="en">', replace(decision, method=None, fixed='a "quote" <b>'))
    given = json.loads(unescape(re.search(r'data-live="([^"]*)"', html)[1]))
    assert given["fixed"] == 'a "quote" <b>' and given["uniformity"] is None and given["ratio"] == 0.5


# ---------------------------------------------------------------- a browser

EARLY = """<script>window.failed = [];
addEventListener("error", (event) => failed.push(event.message));
addEventListener("unhandledrejection", (event) => failed.push(String(event.reason)));
console.error = (...words) => failed.push(words.join(" "));
HTMLElement.prototype.setPointerCapture = () => {};</script>"""
PROBE = """<script>(async () => {
  const wait = (time) => new Promise((done) => setTimeout(done, time));
  const one = (id) => document.getElementById(id), text = (id) => one(id).textContent;
  const until = async (test) => { for (let at = 0; at < 400 && !test(); at += 1) await wait(50); };
  const found = {};
  const set = (id, value) => { one(id).value = value; one(id).dispatchEvent(new Event("input", { bubbles: true })); };
  await until(() => document.documentElement.dataset.ready);
  STEPS
  found.errors = failed;
  found.room = innerWidth - document.documentElement.scrollWidth;
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
})();</script>"""


def browsed(address: str, folder: Path) -> dict:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=40000", "--dump-dom"]
    command += ["--window-size=1400,1000", f"--user-data-dir={folder}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(unescape(re.search(r"FOUND(\{.*\})END", done.stdout, re.DOTALL)[1]))


def with_probe(html: str, steps: str) -> str:
    return html.replace("<head>", "<head>" + EARLY, 1).replace("</body>", PROBE.replace("STEPS", steps) + "</body>")


STATIC = """
  found.budget = [text("budget")];
  found.shown = [text("shown")];
  const scene = one("scene").options[1];
  found.scene = scene.value;
  set("scene", scene.value);
  await wait(200);
  found.shown.push(text("shown"));
  set("scene", "");
  await wait(200);
  document.querySelector("#grid .tile.kept").click();
  found.neighbours = document.querySelectorAll("#detail .near .tile").length;
  found.detail = text("detail");
  found.picture = getComputedStyle(document.querySelector("#detail .tile span")).backgroundImage.slice(0, 9);
  one("move").click();
  found.budget.push(text("budget"));
  found.kept = localStorage.getItem(KEY);
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "m", bubbles: true }));
  found.budget.push(text("budget"));
  const map = one("map"), box = map.getBoundingClientRect();
  const point = (kind, x, y) => map.dispatchEvent(
    new PointerEvent(kind, { clientX: box.left + x, clientY: box.top + y, pointerId: 1 }));
  point("pointerdown", 1, 1);
  for (const kind of ["pointermove", "pointerup"]) point(kind, box.width / 2, box.height - 1);
  found.shown.push(text("shown"));
  found.west = Number(one("west").value);
  found.east = Number(one("east").value);
  document.querySelector("#filters button").click();
  await wait(100);
  found.shown.push(text("shown"));
  set("entropy-high", 3);
  await wait(200);
  found.shown.push(text("shown"));
  found.markup = document.querySelectorAll("#grid b, #detail b, header h1 b").length;
  const named = (item) => item.labels?.length || item.ariaLabel || item.ariaHidden || item.textContent.trim();
  const items = [...document.querySelectorAll("button, input, select, canvas")];
  found.unnamed = items.filter((item) => !item.closest("[hidden]") && !named(item)).map((item) => item.outerHTML);
"""


@pytest.mark.slow
def test_the_page_in_a_browser_filters_explains_and_moves_images(
    made: Path, decision: Decision, tmp_path: Path
) -> None:
    cfg = config_of(root_of(made), f"selection={made}", "page.embedded=20")
    page = write_decision_page(tmp_path / "page", *content(cfg, decision))
    page.write_text(with_probe(page.read_text(encoding="utf-8"), STATIC), encoding="utf-8")
    result, table = browsed(f"file://{page}", tmp_path / "profile"), decision.table
    assert result["errors"] == [] and result["room"] >= 0 and result["markup"] == 0 and result["unnamed"] == []
    kept = int(table["kept"].sum())
    assert result["budget"][0].startswith(f"{kept} of 61 images kept")
    assert result["budget"][1].startswith(f"{kept - 1} of 61 images kept") and "1 under budget" in result["budget"][1]
    assert result["budget"][2] == result["budget"][0]
    assert result["neighbours"] == 8 and "Move out" in result["detail"] and "Kept: it represents" in result["detail"]
    assert result["picture"].startswith("url(") and len(json.loads(result["kept"])["removed"]) == 1
    scene = int((table["scene"] == result["scene"].strip()).sum())
    lon = decision.kept.corpus.manifest["lon"].to_numpy(float)
    boxed = int(((lon >= result["west"]) & (lon <= result["east"])).sum())
    low = int((table["entropy"].to_numpy("f4") <= 3)[table["reason"] != "unreadable"].sum())
    assert result["shown"] == [f"{number} of 61 images shown" for number in (61, scene, boxed, 61, low)]
    assert 0 < scene < 61 and 20 < boxed < 40


LIVE = """
  found.budget = [text("budget")];
  set("ratio", 0.8);
  await until(() => text("busy-text").startsWith("selected"));
  found.budget.push(text("budget"));
  document.querySelector("#grid .tile:not(.kept)").click();
  one("move").click();
  found.budget.push(text("budget"));
  one("form").value = "list";
  one("export").click();
  await until(() => text("done").startsWith("export:"));
  found.done = text("done");
"""


@pytest.mark.slow
def test_the_page_in_a_browser_selects_again_and_exports(made: Path, session: Session, tmp_path: Path) -> None:
    page = session.page
    session.page = with_probe(page.decode(), LIVE).encode()
    try:
        with serving(session) as port:
            result = browsed(f"http://{HOST}:{port}/", tmp_path / "profile")
    finally:
        session.page = page
    assert result["errors"] == [] and result["room"] >= 0
    again = 61 - round(0.8 * 61)
    assert [line.partition(" of")[0] for line in result["budget"]] == ["31", str(again), str(again + 1)]
    exported = Path(result["done"].removeprefix("export: "))
    assert len((exported / "kept.txt").read_text(encoding="utf-8").splitlines()) == again + 1
