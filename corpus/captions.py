"""Captions, scene names and metadata from the files and tables that accompany images; all sources use these rules."""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any

from corpus.names import IMAGE_SUFFIXES, suffix_of
from runtime.errors import UserError

#: Usual names of the column or field of captions, in order of preference; the first one that has captions is used.
CAPTION_KEYS = (
    "captions", "caption", "text", "texts", "sentences", "sentence", "descriptions", "description", "raw",
)  # fmt: skip
#: Usual names of the column or field of the image file.
FILE_KEYS = (
    "file_name", "filename", "file", "filepath", "file_path", "image_file", "image_name", "image_path", "img_path",
    "image", "img", "path", "name",
)  # fmt: skip
SCENE_KEYS = ("scene", "label", "class", "category")
#: Usual names of the column or field with a list of labels of one image.
LABEL_KEYS = ("labels", "label", "classes", "categories")
#: Usual names of the column or field with the name of the class, where the scene is a class number.
NAME_KEYS = ("label_text", "label_name", "class_name", "scene_name", "category_name")
#: File names of tables with captions for many images.
TABLE = re.compile(
    r"(captions|metadata)\.(jsonl|csv|tsv)|captions\.txt"
    r"|(captions|metadata|dataset)((?!_infos?|_dict|_description)[_-].*)?\.json"
)
PLAIN = "a satellite image"
#: Deepest level of nested lists in which captions are searched.
DEEPEST = 8
#: Length of the longest name of a scene, in characters.
LONGEST_SCENE = 255
_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")
_DECIMAL = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def caption_metadata(row: Mapping[str, Any], scene: str, labels: Sequence[str] = ()) -> dict[str, Any]:
    """`caption`, the first caption of a row (`CAPTION_KEYS`), and `captions` if the row has several.

    For a row without captions, `caption` is made from the scene or from the labels; it is "" if there are none.
    """
    texts = own_captions(row) or [scene_caption(scene or ", ".join(labels))]
    return {"caption": texts[0], **({"captions": texts} if len(texts) > 1 else {})}


def own_captions(row: Mapping[str, Any], depth: int = 0) -> list[str]:
    """The captions of a row, from the first field that has any."""
    return next((texts for key in CAPTION_KEYS if key in row and (texts := _texts(row[key], depth))), [])


def _texts(value: Any, depth: int = 0) -> list[str]:
    """Texts in a value: a text, a list of texts, a list written as text ("['a', 'b']"), or a list of objects with text.

    Values that are nested deeper than `DEEPEST` are ignored.
    """
    if depth > DEEPEST:
        return []
    if isinstance(value, bytes):
        value = decoded(value)
    if isinstance(value, str):
        text = value.strip()
        listed = _list_in(text) if text[:1] == "[" else None
        return ([encodable(text)] if text else []) if listed is None else listed
    if isinstance(value, Mapping):
        return own_captions(value, depth + 1)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [text for one in value for text in _texts(one, depth + 1)] if isinstance(value, (list, tuple)) else []


def _list_in(text: str) -> list[str] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns about texts that are not code
                result = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(result, list) and all(isinstance(one, str) for one in result):
            return [text for one in result for text in _texts(one)]
    return None


def captions_in(text: str) -> list[str]:
    """The captions in a text file about one image.

    The file holds one caption per line if all lines end with a full stop, or if none does; otherwise it holds one
    caption. It holds none if it has more numbers than words, as in the annotation files of boxes for object detectors.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    tokens = " ".join(lines).split()
    if sum(any(letter.isalpha() for letter in token) for token in tokens) * 2 < len(tokens) or not tokens:
        return []
    alike = len({line[-1] in ".!?。" for line in lines}) == 1
    return [encodable(line) for line in (lines if alike else ["\n".join(lines)])]


def sample_captions(texts: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, list[str]]:
    """The captions of one image: from a list in its metadata, else from its text files, else one from its metadata."""
    listed = own_captions(metadata)
    written = [caption for text in texts for caption in captions_in(text)]
    return {"captions": list(dict.fromkeys(listed if len(listed) > 1 or not written else written))}


def decoded(data: bytes) -> str:
    """Decode text of unknown encoding.

    The encoding is found by the byte-order mark, or by zero bytes (UTF-16); otherwise it is UTF-8, or cp1252 (Windows)
    if invalid bytes are not just a few in a text of UTF-8; those are replaced.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data.decode(encoding, "replace").removeprefix("\ufeff")
    for encoding, zeros in (("utf-16-le", data[1:512:2]), ("utf-16-be", data[:512:2])):
        if len(zeros) > 1 and zeros.count(0) > 0.6 * len(zeros):
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        sound = sum(letter > "\x7f" and letter != "\ufffd" for letter in text)
        return text if sound > text.count("\ufffd") else data.decode("cp1252", "replace")


@cache
def scene_caption(scene: str) -> str:
    """Caption made from a scene name, for images without a caption; a name such as "class 3" gives a plain caption."""
    if not scene:
        return ""
    return PLAIN if re.fullmatch(r"class \d+", scene) else f"{PLAIN} of {words(scene)}"


def scene_name(value: Any, names: Sequence[str] = ()) -> str:
    """Scene name of a label: a number is an index into `names`, or gives "class 3" if `names` has no such entry.

    A negative number gives no scene, and so does a text longer than `LONGEST_SCENE`.
    """
    text = "" if value is None or isinstance(value, (list, dict)) else encodable(str(value).strip())
    if text.lower() in ("nan", "none", "null") or len(text) > LONGEST_SCENE:
        return ""
    if not _NUMBER.fullmatch(text):
        return text
    if text.startswith("-"):
        return ""
    number = text.lstrip("+").partition(".")[0]
    position = int(number) if len(number) < 10 else len(names)
    return names[position] if position < len(names) else f"class {number}"


def row_scene(row: Mapping[str, Any], names: Sequence[str] = (), keys: Sequence[str] = SCENE_KEYS) -> str:
    """The scene that a row names, "" for none; if it is a number, a class name in the same row takes precedence."""
    scene = next((result for key in keys if (result := scene_name(row.get(key), names))), "")
    named = next((scene_name(row[key]) for key in NAME_KEYS if isinstance(row.get(key), str)), "")
    return named if named and re.fullmatch(r"class \d+", scene) else scene


def label_list(row: Mapping[str, Any], names: Sequence[str] = ()) -> list[str]:
    """The names in the first field that lists several labels of one image, as in BigEarthNet.

    Numbers without names are left out.
    """
    listed = next((value for key in LABEL_KEYS if isinstance(value := row.get(key), (list, tuple))), ())
    result = [scene_name(value, names) for value in listed]
    return [name for name in result if name and not re.fullmatch(r"class \d+", name)]


def class_list(data: bytes) -> tuple[str, ...]:
    """Names of the classes 0, 1, ... in a file: one line per class, with or without its number, or JSON."""
    text = decoded(data).strip()
    if text[:1] in "[{":
        try:
            return class_table(json.loads(text))
        except (ValueError, RecursionError):
            return ()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.fullmatch(r"(\d+)\s*[\s:,;=]\s*(\S.*)", line) for line in lines]
    if lines and all(numbered):
        return class_table({match[1]: match[2] for match in numbered if match})
    return tuple(lines)


def class_table(given: Any) -> tuple[str, ...]:
    """Names of the classes 0, 1, ... from a list, or from a mapping of numbers to names or of names to numbers."""
    if not isinstance(given, Mapping):
        return tuple(str(name) for name in given)
    pairs = [(str(key), str(value)) for key, value in given.items()]
    if all(_NUMBER.fullmatch(value) for _, value in pairs) and not all(_NUMBER.fullmatch(key) for key, _ in pairs):
        pairs = [(value, key) for key, value in pairs]
    if not all(re.fullmatch(r"\d{1,6}", key) for key, _ in pairs):
        return ()
    named = {int(key): value for key, value in pairs}
    return tuple(named.get(number, f"class {number}") for number in range(max(named, default=-1) + 1))


def chosen_classes(given: Any) -> tuple[str, ...]:
    """Class names of the option `corpus.class_names`: a list, a mapping, or the path of a file with the names.

    Raises:
        UserError: the file does not exist or holds no names.
    """
    if not isinstance(given, str):
        return class_table(given or ())
    try:
        with open(os.path.expanduser(given), "rb") as file:
            names = class_list(file.read())
    except OSError as error:
        raise UserError(
            f"corpus.class_names={given} cannot be read ({error.strerror}): give a list or a file"
        ) from None
    if not names:
        raise UserError(f"corpus.class_names={given} names no classes: give one line per class, for 0, 1, …")
    return names


def words(name: str) -> str:
    """Split a name into words: `BaseballField`, `baseball_field` and `baseball-field` give "baseball field"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.sub(r"[\s_-]+", " ", spaced).strip().lower()


def scalars(row: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The numbers and texts of a row that are not standard columns of the manifest: location, resolution, date etc.

    `ground` and `copy_in` are left out as well: `ground` guarantees disjoint ground, which only a source that knows the
    extent of its images can do.
    """
    own = ("id", "scene", "label", "caption", "captions", "text", "stamp", "readable", "reason", "file_name", "split")
    own = (*own, "ground", "copy_in")
    if not row:
        return {}
    dated = {key: value.isoformat() if isinstance(value, date) else value for key, value in row.items()}
    known = {_column(str(key)): value for key, value in dated.items() if isinstance(value, (str, int, float, bool))}
    return {key: _storable(value) for key, value in known.items() if key not in own}


def encodable(text: str) -> str:
    """The text with lone surrogates (for example of truncated emojis) escaped, because files cannot store them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _column(key: str) -> str:
    """A key as the name of a column, without zero bytes, at which other libraries would end the name."""
    return encodable(key).replace("\0", "\\0")


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    return (
        str(value) if isinstance(value, int) and abs(value) >= 2**63 else value
    )  # too large for a column of 64-bit integers


# ------------------------------------------------------------------------------------------------- tables of captions


def table_rows(path: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the file name and the row of every image in a table.

    Supported are JSON lines and CSV with a column of `FILE_KEYS`, CSV without a header whose first cells are image
    names, and JSON in one of four forms: COCO captions, Karpathy splits (RSICD, UCM, Sydney), a list of rows, or a
    mapping from file to caption.

    Args:
        path: path of the table, for messages; the suffix determines the format.
        data: content of the table.
    Raises:
        UserError: a line of JSON lines is not an object with a file name, or a CSV file is broken.
    """
    if path.endswith(".jsonl"):
        return _json_lines(path, decoded(data))
    return _document(data) if path.endswith(".json") else _cells(path, decoded(data))


def _file_of(row: Mapping[str, Any]) -> str | None:
    return next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str) and row[key]), None)


def _json_lines(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        name = _file_of(row) if isinstance(row, dict) else None
        if name is None:
            raise UserError(
                f'{path}, line {number}, is not a JSON object with a "file_name": correct or remove that line'
            )
        yield name, row


def _document(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        result = json.loads(decoded(data))
    except (ValueError, RecursionError):
        return
    if isinstance(result, dict) and isinstance(result.get("images"), list):
        yield from _images_of(result)
        return
    if isinstance(result, dict):
        result = next(
            (result[key] for key in ("data", "annotations", "rows") if isinstance(result.get(key), list)), result
        )
    if isinstance(result, dict) and any(suffix_of(name) in IMAGE_SUFFIXES for name in result):
        result = [{"file_name": name, **_row_of(value)} for name, value in result.items()]
    for row in result if isinstance(result, list) else ():
        name = _file_of(row) if isinstance(row, dict) else None
        if name is not None:
            yield name, row


def _row_of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"captions": value}


def _images_of(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of COCO's images and annotations, or of Karpathy's images with sentences; `filepath` may name the folder."""
    about: dict[Any, list[str]] = {}
    for annotation in result.get("annotations") or ():
        if isinstance(annotation, dict):
            about.setdefault(str(annotation.get("image_id")), []).extend(own_captions(annotation))
    for image in result["images"]:
        if not isinstance(image, dict):
            continue
        name = next(
            (image[key] for key in ("file_name", "filename") if isinstance(image.get(key), str)), _file_of(image)
        )
        if name is None:
            continue
        folder = image.get("filepath")
        captions = about.get(str(image.get("id")), []) or own_captions(image)
        kept = {key: value for key, value in image.items() if key in ("split", "scene", "label", "lon", "lat")}
        place = f"{folder}/{name}" if isinstance(folder, str) and folder and not folder.endswith(name) else name
        yield place, {**kept, "captions": captions}


def _cells(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with any usual separator; an unquoted caption in the last column may contain separators."""
    first = text.lstrip("\n").partition("\n")[0]
    separator = max("\t,;|", key=first.count)
    csv.field_size_limit(2**30)
    try:
        table = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} is not a valid CSV table ({error}): correct or remove the file") from None
    if not table or len(table[0]) < 2:
        return
    header = [cell.strip() for cell in table[0]]
    lower = [cell.lower() for cell in header]
    file = next((lower.index(key) for key in FILE_KEYS if key in lower), None)
    if file is None and suffix_of(header[0]) in IMAGE_SUFFIXES:
        header, lower, file = ["file_name", "captions"], ["file_name", "captions"], 0
    elif file is None:
        return
    else:
        table = table[1:]
    kinds = _number_columns(table, len(header))
    for row in table:
        if len(row) > len(header):
            row = [*row[: len(header) - 1], separator.join(row[len(header) - 1 :])]
        if len(row) <= file or not row[file].strip():
            continue
        known = {header[at] if lower[at] not in CAPTION_KEYS else lower[at]: cell for at, cell in enumerate(row)}
        for at in kinds:
            if at < len(row) and lower[at] not in (*FILE_KEYS, *CAPTION_KEYS):
                known[header[at]] = float(row[at]) if row[at].strip() else None
        yield row[file].strip(), known


def _number_columns(table: Sequence[Sequence[str]], width: int) -> list[int]:
    """Positions of the columns that hold only numbers and empty cells."""
    columns = [[row[at].strip() for row in table if at < len(row) and row[at].strip()] for at in range(width)]
    return [at for at, cells in enumerate(columns) if cells and all(_DECIMAL.fullmatch(cell) for cell in cells)]
