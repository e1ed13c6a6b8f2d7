"""Every pruning method at every ratio, judged without training: `make quality`."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from corpus.application import run
from corpus.artefacts import fingerprint, read_json
from eval.tables import append_result, build_tables, read_results, to_markdown, write_tables
from prune.selection import select
from scripts.reproduce import subset, with_method

TABLE = "subset_quality"


def main(cfg: DictConfig) -> None:
    results = Path(cfg.results) / cfg.profile.name / "quality"
    results.mkdir(parents=True, exist_ok=True)
    path = results / "results.jsonl"
    for method in cfg.quality.methods:
        for ratio in [0.0] if method == "full" else cfg.quality.ratios:
            chosen = with_method(method, ratio)
            start = time.perf_counter()
            selection, _ = select(chosen, method)
            directory = subset(chosen, method)
            row = {
                "stage": "subset",
                "corpus": cfg.corpus.name,
                "prune": method,
                "ratio": ratio,
                "seed": int(cfg.seed),
                "step": 0,
                "metrics": {
                    **read_json(directory / "metrics.json"),
                    "seconds": read_json(selection / "summary.json")["seconds"].get("selection", 0.0),
                },
                "fingerprint": fingerprint(directory=directory.name),
            }
            append_result(path, row)
            print(f"{method} {ratio:g}: {time.perf_counter() - start:.1f} s", flush=True)
    tables = build_tables(read_results(path))
    write_tables(tables, results)
    print(to_markdown(TABLE, tables[TABLE]))
    print(f"results: {results}")


if __name__ == "__main__":
    run(main)
