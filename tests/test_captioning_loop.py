"""The two loops over image-text pairs: kept pairs, new descriptions, caching, and unusual corpora."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_pairs import SMALL, material, swapped, world

from captioning import describing
from captioning.captioners.captioner import ImageMetadata, Undescribed
from captioning.loop import (
    CAPTIONS,
    REFUSED,
    SUMMARY,
    Loops,
    best_of_images,
    clean_captions,
    scores_of_images,
    with_captions,
)
from captioning.pairs import EMPTY, GIVEN, NO_WORDS, SCENE_NAME, Pairs, given_pairs, has_words
from captioning.scorers import FittedScorer, Material
from runtime.artefacts import nothing_built, read_json
from runtime.errors import UserError
from runtime.notices import notice

SCORERS = (FittedScorer(SMALL),)
#: Captions in which no word and no word hash occurs twice.
UNKNOWN = [f"word{3 * row}" for row in range(60)]


@pytest.fixture(autouse=True)
def notices_again() -> None:
    notice.cache_clear()


@dataclass(frozen=True)
class Scripted:
    """A captioner with fixed texts for each image and attempt; records which images it was given.

    Args:
        known: texts of an image by its pixels; the last one is repeated.
        dies_at: the call at which it fails.
    """

    known: dict = field(metadata={"fingerprint": False})
    shown: list = field(default_factory=list, metadata={"fingerprint": False})
    name: str = "scripted"
    batch_size: int = 4
    attempts: int = 2
    dies_at: int = field(default=-1, metadata={"fingerprint": False})

    def __call__(
        self, images: np.ndarray, metadata: Sequence[ImageMetadata], attempt: int, seeds: Sequence[int]
    ) -> list[str | Undescribed]:
        if len(self.shown) == self.dies_at:
            raise KeyboardInterrupt
        assert len(images) == len(metadata) == len(seeds) <= self.batch_size
        self.shown.append([(attempt, image.tobytes()) for image in images])
        result = [self.known[image.tobytes()] for image in images]
        return [texts[min(attempt, len(texts) - 1)] for texts in result]


def scripted(result: Material, texts: Sequence, **options: object) -> Scripted:
    """A captioner for the images of a corpus: one text each, or a list with one text per attempt."""
    known = {
        image.tobytes(): text if isinstance(text, list) else [text]
        for image, text in zip(result.corpus.images, texts, strict=True)
    }
    return Scripted(known, **options)


def shown_rows(captioner: Scripted, result: Material, attempt: int) -> list[int]:
    rows = {image.tobytes(): row for row, image in enumerate(result.corpus.images)}
    requested = itertools.chain.from_iterable(captioner.shown)
    return sorted(rows[image] for number, image in requested if number == attempt)


def cleaned(result: Material, captioner: Scripted, runs: Path, **options: object) -> tuple[Path, pd.DataFrame]:
    directory = clean_captions(result, Loops(SCORERS, captioner, **options), runs)
    return directory, pd.read_parquet(directory / CAPTIONS)


# ---------------------------------------------------------------- repair


@pytest.fixture(scope="module")
def repaired(tmp_path_factory) -> tuple:
    """400 images, 80 of them with another scene's caption, and a captioner that knows their content.

    Its first text for every fourth image is also of another scene; the second text is right.
    """
    runs = tmp_path_factory.mktemp("repaired")
    features, captions, scenes = world(400)
    dirty, wrong = swapped(captions, scenes, 0.2)
    result = material(features, dirty, scenes, runs / "corpus")
    far = np.array(captions, dtype=object)[[np.flatnonzero(scenes != scene)[0] for scene in scenes]]
    texts = [[far[row] if row % 4 == 0 else f"here is {captions[row]}", captions[row]] for row in range(400)]
    captioner = scripted(result, texts)
    directory, table = cleaned(result, captioner, runs)
    return result, captioner, directory, table, wrong, captions


def test_every_given_caption_remains_a_candidate(repaired: tuple) -> None:
    result, _, _, table, _, _ = repaired
    first = table[table["round"] == 0]
    assert first["caption"].tolist() == result.corpus.manifest["caption"].tolist()
    assert first["image"].tolist() == list(range(400)) and set(first["source"]) == {GIVEN}


def test_only_images_with_mismatched_captions_are_described_again(repaired: tuple) -> None:
    result, captioner, _, table, wrong, _ = repaired
    flagged = table["image"][(table["round"] == 0) & (table["mismatch"] > 0.5)].tolist()
    assert shown_rows(captioner, result, 0) == flagged
    assert wrong[flagged].mean() > 0.95 and np.isin(np.flatnonzero(wrong), flagged).mean() > 0.95
    again = shown_rows(captioner, result, 1)
    assert set(again) < set(flagged) and {row % 4 for row in again if row in flagged} == {0}


def test_new_captions_do_not_change_the_scores_of_given_captions(repaired: tuple) -> None:
    result, captioner, directory, table, _, _ = repaired
    runs = directory.parent.parent
    before = pd.read_parquet(clean_captions(result, Loops(SCORERS, captioner, describe="none"), runs) / CAPTIONS)
    columns = ["cosine_fitted", "evidence", "fit", "mismatch"]
    np.testing.assert_allclose(table[columns][table["round"] == 0], before[columns], atol=1e-3)


def test_mismatched_captions_are_found_in_a_script_without_spaces(tmp_path: Path) -> None:
    features, captions, scenes = world(400)
    letters = {word: chr(0x4E00 + 7 * number) for number, word in enumerate(sorted({*" ".join(captions).split()}))}
    dirty, wrong = swapped(["".join(letters[word] for word in text.split()) for text in captions], scenes, 0.3)
    result = material(features, dirty, scenes, tmp_path / "corpus")
    _, table = cleaned(result, scripted(result, captions), tmp_path, describe="none")
    flagged = table["mismatch"].to_numpy() > 0.5
    assert flagged[wrong].mean() > 0.9 and flagged[~wrong].mean() < 0.02


def test_repaired_images_have_a_correct_caption(repaired: tuple) -> None:
    result, _, directory, table, wrong, captions = repaired
    chosen = table[table["chosen"]].set_index("image")
    assert len(chosen) == 400 and chosen.index.is_unique
    assert (chosen["mismatch"][wrong] <= 0.5).mean() > 0.95 and (chosen["round"][wrong] > 0).mean() > 0.95
    assert (chosen["round"][~wrong] == 0).mean() > 0.95
    right = [captions[row] in chosen["caption"][row] for row in np.flatnonzero(wrong)]
    assert np.mean(right) > 0.95
    corpus = with_captions(result.corpus, directory, 0.5)
    assert corpus.manifest["caption"].tolist() == chosen["caption"].tolist() and corpus.captions == directory.name


def test_caption_lists_contain_the_good_captions_with_the_best_one_first(repaired: tuple) -> None:
    result, _, directory, table, _, _ = repaired
    corpus = with_captions(result.corpus, directory, 0.5)
    for row, texts in enumerate(corpus.manifest["captions"]):
        own = table[table["image"] == row]
        good = own[own["mismatch"] <= 0.5]
        assert texts[0] == corpus.manifest["caption"][row]
        assert sorted(texts) == sorted(good["caption"] if len(good) else own["caption"][own["chosen"]])


def test_the_summary_agrees_with_the_table(repaired: tuple) -> None:
    _, _, directory, table, wrong, _ = repaired
    summary, chosen = read_json(directory / SUMMARY), table[table["chosen"]]
    assert summary["pairs"] == len(table) and summary["images"] == 400
    assert summary["sources"] == table["source"].value_counts().to_dict()
    assert summary["chosen"] == chosen["source"].value_counts().to_dict()
    assert summary["mismatched_given"] == ((table["round"] == 0) & (table["mismatch"] > 0.6)).sum()
    assert summary["mismatched_images"] == (chosen["mismatch"] > 0.6).sum()
    assert summary["mismatched_fraction"] == pytest.approx(wrong.mean(), abs=0.1)
    assert sum(scene["repaired"] for scene in summary["scenes"].values()) == (chosen["round"] > 0).sum()
    assert summary["refused"] == {} and summary["captioner"] == "scripted"


def test_the_scores_of_an_image_are_those_of_its_chosen_caption(repaired: tuple) -> None:
    result, _, directory, table, _, _ = repaired
    scores, chosen = scores_of_images(result.corpus, directory), table[table["chosen"]]
    for name, column in (("mismatch", "mismatch"), ("fit", "fit"), ("cosine", "cosine_fitted")):
        np.testing.assert_array_equal(scores[name], chosen[column].to_numpy(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.6, 0.9]), st.sampled_from([-1.0, 0.0, 2.0])),
        max_size=20,
    )
)
def test_the_chosen_candidate_agrees_with_a_direct_implementation_of_the_rule(
    rows: list[tuple[int, float, float]],
) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    image, mismatch, fit = (np.array(column) for column in zip(*rows, strict=True)) if rows else [np.empty(0)] * 3
    chosen = best_of_images(image, pd.DataFrame({"mismatch": mismatch, "fit": fit}), 0.5)
    expected = []
    for one in dict.fromkeys(row[0] for row in rows):
        own = [position for position, row in enumerate(rows) if row[0] == one]
        good = [position for position in own if rows[position][1] <= 0.5]
        if good:
            expected.append(max(good, key=lambda position: (rows[position][2], -position)))
        else:
            expected.append(min(own, key=lambda position: (rows[position][1], position)))
    assert np.flatnonzero(chosen).tolist() == expected


# ---------------------------------------------------------------- described images


def few(tmp_path: Path, count: int = 60, captions: list | None = None) -> tuple[Material, list[str]]:
    features, own, scenes = world(count)
    return material(features, own if captions is None else captions, scenes, tmp_path / "corpus"), own


def test_describe_none_describes_no_image_and_describe_all_every_image(tmp_path: Path) -> None:
    result, captions = few(tmp_path)
    captioner = scripted(result, [[f"first {text}", f"second {text}"] for text in captions])
    _, table = cleaned(result, captioner, tmp_path, describe="none")
    assert captioner.shown == [] and len(table) == 60
    _, table = cleaned(result, captioner, tmp_path, describe="all")
    assert all(shown_rows(captioner, result, attempt) == list(range(60)) for attempt in (0, 1))
    assert table.groupby("image")["round"].agg(list).tolist() == [[0, 1, 2]] * 60


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rounds_limits_the_number_of_descriptions_per_image(tmp_path: Path, rounds: int) -> None:
    result, _captions = few(tmp_path, captions=[text if row else "" for row, text in enumerate(world(60)[1])])
    captioner = scripted(result, [Undescribed("too dark")] * 60)
    directory, _ = cleaned(result, captioner, tmp_path, rounds=rounds)
    assert [shown_rows(captioner, result, attempt) for attempt in range(4)] == [[0]] * rounds + [[]] * (4 - rounds)
    refused = pd.read_parquet(directory / REFUSED)
    assert refused["reason"].tolist() == [EMPTY, "too dark"][: 1 + bool(rounds)]  # reported once


def test_images_without_a_caption_get_one_or_are_quarantined(tmp_path: Path) -> None:
    given_texts = list(world(60)[1])
    given_texts[3], given_texts[5], given_texts[7] = "", " ??? ", ["!", "..."]
    result, captions = few(tmp_path, captions=given_texts)
    texts = [Undescribed("no data") if row in (5, 7) else text for row, text in enumerate(captions)]
    directory, table = cleaned(result, scripted(result, texts), tmp_path)
    assert table["caption"][table["image"] == 3].tolist() == [captions[3]]
    assert not table["image"].isin([5, 7]).any()
    refused = pd.read_parquet(directory / REFUSED)
    assert sorted(map(tuple, refused.to_numpy().tolist())) == sorted([
        ("0003.png", "", EMPTY), ("0005.png", "???", NO_WORDS), ("0007.png", "!", NO_WORDS),
        ("0007.png", "...", NO_WORDS), ("0005.png", "", "no data"), ("0007.png", "", "no data"),
    ])  # fmt: skip
    scores = scores_of_images(result.corpus, directory)
    assert all(np.isnan(values[[5, 7]]).all() and np.isfinite(np.delete(values, [5, 7])).all()
               for values in scores.values())  # fmt: skip
    manifest = with_captions(result.corpus, directory, 0.5).manifest
    assert manifest["caption"][3] == captions[3] and manifest["caption"][5] == " ??? "
    assert manifest["captions"][7] == ["!", "..."], "an image without a candidate keeps what it has"


def test_a_text_without_words_from_a_captioner_is_refused(tmp_path: Path) -> None:
    result, captions = few(tmp_path, captions=[text if row > 1 else "" for row, text in enumerate(world(60)[1])])
    directory, table = cleaned(result, scripted(result, ["", " - 12 -", *captions[2:]]), tmp_path)
    assert table["image"].tolist() == list(range(2, 60))
    assert pd.read_parquet(directory / REFUSED)["reason"].tolist() == [EMPTY, EMPTY, NO_WORDS, NO_WORDS]


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("a forest", True), ("Лес и дорога", True), ("森林和道路", True), ("नदी के पास", True), ("غابة", True),
        ("林", True), ("x", False), ("", False), ("  ", False), ("?!... --", False), ("12 3", False), ("a 1", False),
        ("__", False), ("🌲🌲", False),
    ],
)  # fmt: skip
def test_words_are_recognised_in_any_script(text: str, fine: bool) -> None:
    assert has_words(text) is fine


def test_unusual_captions_are_kept_unchanged_and_scored(tmp_path: Path) -> None:
    """They are kept unchanged, up to the last of 10,000 characters."""
    odd = ["word " * 2000, "森林和道路在河边", "Лес и дорога", "नदी के पास जंगल"]
    odd += ["a\nforest\tand  roads", "forest 🌲" * 3]
    result, captions = few(tmp_path, captions=odd + world(60)[1][6:])
    _directory, table = cleaned(result, scripted(result, [f"seen: {text}" for text in captions]), tmp_path)
    assert table["caption"][table["round"] == 0].tolist()[:6] == [text.strip() for text in odd]
    assert np.isfinite(table[["mismatch", "fit", "evidence", "cosine_fitted"]].to_numpy()).all()


def test_given_pairs_have_no_repeats_and_empty_captions_are_refused(tmp_path: Path) -> None:
    """Several captions per image, a repeated one, one that only names the scene, an unreadable image."""
    captions: list = [["a lake ", "a lake", "two boats"], "a satellite image of forest", ["", "sand"], "gone", None]
    result = material(np.eye(5, dtype=np.float32), captions, ["forest"] * 5, tmp_path)
    result.corpus.manifest.loc[3, "readable"] = False
    result.corpus.manifest.loc[4, "caption"] = ""
    pairs, refused = given_pairs(result.corpus.manifest)
    assert list(zip(pairs.image, pairs.text, pairs.source, pairs.round, strict=True)) == [
        (0, "a lake", GIVEN, 0), (0, "two boats", GIVEN, 0), (1, "a satellite image of forest", SCENE_NAME, 0),
        (2, "sand", GIVEN, 0),
    ]  # fmt: skip
    assert refused["id"].tolist() == ["0002.png", "0004.png"] and set(refused["reason"]) == {EMPTY}


def test_pairs_join_image_by_image_without_repeats() -> None:
    first = Pairs.of([0, 0, 2], ["a", "b", "c"], [GIVEN] * 3, 0)
    both = first.joined(Pairs.of([1, 0, 2], ["d", "b", "a"], ["pen"] * 3, 1))
    assert both.image.tolist() == [0, 0, 1, 2, 2] and both.text.tolist() == ["a", "b", "d", "c", "a"]
    assert both.source.tolist() == [GIVEN, GIVEN, "pen", GIVEN, "pen"] and both.round.tolist() == [0, 0, 1, 0, 1]


# ---------------------------------------------------------------- odd corpora


def test_all_images_of_a_corpus_without_captions_are_described(tmp_path: Path, capsys) -> None:
    result, captions = few(tmp_path, captions=[""] * 60)
    captioner = scripted(result, captions)
    directory, table = cleaned(result, captioner, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "no image of made has a caption: scripted describes all of them"
    assert shown_rows(captioner, result, 0) == list(range(60)) and table["chosen"].sum() == 60
    assert read_json(directory / SUMMARY)["sources"] == {"scripted": 60}
    assert with_captions(result.corpus, directory, 0.5).manifest["caption"].tolist() == captions


def test_a_corpus_without_captions_is_refused_if_it_cannot_be_described(tmp_path: Path) -> None:
    result, captions = few(tmp_path, captions=[""] * 60)
    with pytest.raises(UserError, match="corpus made has no captions: give captions"):
        cleaned(result, scripted(result, captions), tmp_path, describe="none")
    with pytest.raises(UserError, match=r"no image of made can be described \(no data\)"):
        cleaned(result, scripted(result, [Undescribed("no data")] * 60), tmp_path)


def test_a_corpus_of_one_scene_has_no_mismatched_captions(tmp_path: Path) -> None:
    features, captions, _ = world(60)
    result = material(features, captions, ["forest"] * 60, tmp_path / "corpus")
    captioner = scripted(result, captions)
    _, table = cleaned(result, captioner, tmp_path)
    assert not table["mismatch"].any() and captioner.shown == [] and table["fit"].nunique() > 10


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("captioned", [True, False])
def test_few_images_give_a_result_or_a_clear_error(tmp_path: Path, count: int, captioned: bool) -> None:
    features, captions, scenes = world(count)
    result = material(features, captions if captioned else [""] * count, scenes, tmp_path / "corpus")
    if count < 3:
        with pytest.raises(UserError, match=f"{count} captions are too few to fit .* in 5 folds"):
            cleaned(result, scripted(result, captions), tmp_path)
        return
    _, table = cleaned(result, scripted(result, captions), tmp_path)
    assert table["chosen"].sum() == count and np.isfinite(table["fit"]).all()


@pytest.mark.parametrize(
    "captions",
    [["a satellite image"] * 60, ["森林和道路"] * 60, UNKNOWN],
    ids=["one caption for all", "one without spaces", "no common word"],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_uninformative_captions_are_rarely_reported_as_mismatched(
    tmp_path: Path, captions: list[str], labelled: bool
) -> None:
    features, _, scenes = world(60)
    result = material(features, captions, scenes if labelled else [""] * 60, tmp_path / "corpus")
    _, table = cleaned(result, scripted(result, captions), tmp_path)
    assert (table["mismatch"] > 0.5).mean() < 0.05 and np.isfinite(table["fit"]).all()


def test_captions_without_a_common_word_are_reported(tmp_path: Path, capsys) -> None:
    result, captions = few(tmp_path, captions=UNKNOWN)
    cleaned(result, scripted(result, captions), tmp_path, describe="none")
    assert (
        "no word occurs in two captions: captioning.scorers.fitted cannot distinguish pairs" in capsys.readouterr().err
    )


# ---------------------------------------------------------------- caching


def test_a_second_run_builds_nothing(tmp_path: Path) -> None:
    features, captions, scenes = world(80)
    result = material(features, swapped(captions, scenes, 0.3)[0], scenes, tmp_path / "corpus")
    captioner = scripted(result, captions)
    directory, _ = cleaned(result, captioner, tmp_path)
    assert captioner.shown
    count = len(captioner.shown)
    with nothing_built():
        assert cleaned(result, captioner, tmp_path)[0] == directory
    assert len(captioner.shown) == count


def test_a_killed_description_resumes_from_its_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describing, "BLOCK", 8)
    result, captions = few(tmp_path, captions=[""] * 60)
    killed = scripted(result, captions, dies_at=5)  # in the middle of the third block
    with pytest.raises(KeyboardInterrupt):
        cleaned(result, killed, tmp_path / "killed")
    assert len(killed.shown) == 5
    again = scripted(result, captions)
    _, table = cleaned(result, again, tmp_path / "killed")
    assert shown_rows(again, result, 0) == list(range(16, 60))
    _, whole = cleaned(result, scripted(result, captions), tmp_path / "whole")
    pd.testing.assert_frame_equal(table, whole)
    [stage] = (tmp_path / "killed" / "descriptions").iterdir()
    assert sorted(path.name for path in stage.iterdir()) == ["descriptions.parquet", "stage.json"]


def test_the_name_of_the_captioner_is_recorded_even_for_equal_texts(tmp_path: Path) -> None:
    """Also if two captioners write the same words, or if no image is described."""
    result, captions = few(tmp_path, captions=[text if row else "" for row, text in enumerate(world(60)[1])])
    for name in ("first", "second"):
        directory, table = cleaned(result, scripted(result, captions, name=name), tmp_path)
        assert table["source"][0] == name and read_json(directory / SUMMARY)["captioner"] == name
    result, captions = few(tmp_path / "whole")
    for name in ("first", "second"):
        directory, _ = cleaned(result, scripted(result, captions, name=name), tmp_path)
        assert read_json(directory / SUMMARY)["captioner"] == name


def test_other_options_and_other_captions_give_other_result_folders(tmp_path: Path) -> None:
    result, captions = few(tmp_path)
    base = Loops(SCORERS, scripted(result, [f"seen: {text}" for text in captions]))
    again = replace(SMALL, power=1.0)
    others = [
        replace(base, most_mismatch=0.4), replace(base, seed=1), replace(base, describe="all"),
        replace(base, scorers=(FittedScorer(again),)), replace(base, scorers=(FittedScorer(SMALL, seed=2),)),
    ]  # fmt: skip
    directories = [clean_captions(result, loops, tmp_path) for loops in (base, *others)]
    assert len(set(directories)) == len(directories)
    changed = material(*world(60)[:1], [*captions[:-1], "a lake and a pond"], world(60)[2], tmp_path / "other")
    assert clean_captions(changed, base, tmp_path) not in directories


def test_texts_do_not_depend_on_the_sizes_of_batches_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed of an image depends only on its id, the seed and the attempt."""

    class Drawn(Scripted):
        def __call__(self, images, metadata, attempt, seeds):
            return [f"caption {'abcdefgh'[seed % 8]} of {seed}" for seed in seeds]

    result, _ = few(tmp_path, captions=[""] * 60)
    texts = []
    for block, batch in ((8, 4), (2048, 7)):
        monkeypatch.setattr(describing, "BLOCK", block)
        _directory, table = cleaned(result, Drawn({}, batch_size=batch), tmp_path / str(block), rounds=1)
        texts.append(table["caption"].tolist())
    assert texts[0] == texts[1] and len(set(texts[0])) == 60
    other = clean_captions(result, Loops(SCORERS, Drawn({}), rounds=1, seed=1), tmp_path)
    assert not set(pd.read_parquet(other / CAPTIONS)["caption"]) & set(texts[0])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"describe": "some"}, "captioning.describe=some is unknown: give none, mismatched, all"),
        ({"most_mismatch": 0}, "captioning.most_mismatch=0"),
        ({"most_mismatch": 1.0}, "captioning.most_mismatch=1.0"),
        ({"scorers": ()}, "captioning.scorers is empty"),
    ],
)
def test_invalid_options_are_refused(options: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Loops(**{"scorers": SCORERS, "captioner": Scripted({}), **options})


@pytest.mark.parametrize(
    ("captions", "scenes", "message"),
    [
        (["an aerial image"] * 80, world(80)[2], "captions: all are the same"),
        (world(80)[1], ["forest"] * 80, "captions: all images are of one scene"),
    ],
)
def test_identical_captions_and_a_single_scene_are_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], captions: list[str], scenes: list[str], message: str
) -> None:
    notice.cache_clear()
    result = material(world(80)[0], captions, scenes, tmp_path / "corpus")
    cleaned(result, scripted(result, captions), tmp_path, describe="none")
    assert sum(line.startswith(message) for line in capsys.readouterr().err.splitlines()) == 1
