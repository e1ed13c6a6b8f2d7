"""Example for FiftyOne: tag samples to view a selection. Needs `pip install fiftyone`.

`python examples/fiftyone_tags.py DATASET SELECTION`. DATASET is a FiftyOne data set of the files that the command
`python prune/run.py corpus=folder corpus.root=FOLDER` pruned; SELECTION is the directory that the command printed.
Then run `fiftyone app launch DATASET`, and filter by `rsprune:kept` or `rsprune:redundant`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from rsprune import read_selection, selection_tags


def tag_samples(dataset: Any, tags: Mapping[str, list[str]]) -> int:
    """Tag every sample with a file path that ends in an id of the selection; returns the number of samples found.

    Uses only `Dataset.iter_samples(autosave=True)`, `sample.filepath` and the list `sample.tags` of FiftyOne. Older
    `rsprune:` tags are replaced, other tags are kept.
    """
    by_name: dict[str, list[str]] = {PurePath(name).as_posix(): given for name, given in tags.items()}
    depths = {len(PurePath(name).parts) for name in by_name}
    result = 0
    for sample in dataset.iter_samples(autosave=True):
        parts = PurePath(sample.filepath).parts
        names = ("/".join(parts[-depth:]) for depth in sorted(depths, reverse=True))
        given = next((by_name[name] for name in names if name in by_name), None)
        if given is not None:
            sample.tags = [tag for tag in sample.tags if not tag.startswith("rsprune:")] + given
            result += 1
    return result


def main(name: str, directory: str) -> None:
    import fiftyone as fo

    table = read_selection(directory)
    result = tag_samples(fo.load_dataset(name), selection_tags(table))
    print(f"{result} samples of {name} tagged; the selection has {len(table)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
