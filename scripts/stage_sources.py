"""Record every stage's version and code hash; run `python scripts/stage_sources.py` when either has changed."""

from __future__ import annotations

from runtime.artefacts import read_json, write_json
from runtime.versions import SOURCES, outdated, sources


def main() -> None:
    for line in outdated(read_json(SOURCES) if SOURCES.is_file() else {"stages": {}, "modules": {}}):
        print(
            f"{line.split(': ')[0]}: recorded; raise the version of the stage in runtime/versions.py if results that "
            "exist would change (not for a new file)"
        )
    write_json(SOURCES, sources())


if __name__ == "__main__":
    main()
