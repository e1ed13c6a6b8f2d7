"""Put the tables and pictures of results/local into README.md: `make readme`."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image

from corpus.application import run
from corpus.artefacts import read_json
from corpus.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("generation", "subset_quality", "super_resolution", "semantic_synthesis")


def screenshot(page: Path, target: Path, width: int, height: int) -> None:
    """Photograph a page in headless Chromium.

    Raises:
        UserError: there is no Chromium.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("no Chromium on PATH to photograph the report with: install it and run make readme again")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={target}"]
        subprocess.run([chromium, *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE).save(target, optimize=True)


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name
    if not (results / "report.html").is_file():
        raise UserError(f"no report in {results}: run `make reproduce PROFILE={cfg.profile.name}` first")
    parts, explained = [], ""
    for name in TABLES:
        table, note = (results / "tables" / f"{name}.md").read_text(encoding="utf-8").strip().split("\n\n")
        first, mark, rest = note.partition(" ↓ ")  # what all tables share is said once, below the last
        explained = max(explained, mark.strip() + " " + rest, key=len)
        parts.append(f"**{name.replace('_', ' ').capitalize()}.** {first}\n\n{table}")
    parts.append(explained)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    filled = "<!-- results -->\n" + "\n\n".join(parts) + "\n<!-- /results -->"
    text = re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: filled, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    screenshot(results / "report.html", images / "report.png", 1200, 1500)
    places = read_json(results / "runs.json")
    samples = sorted((Path(places["generation/rsprune"]) / "samples").glob("step_*.png"))[-1]
    shutil.copy(samples, images / "samples.png")
    print(f"results: {readme}")


if __name__ == "__main__":
    run(main)
