"""Check the documents: links, code, commands and their options, generated tables: `make docs-check`."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from report.documents import PUBLISHED, fill_readme, write_results
from runtime.application import CONFIGS
from runtime.command_line import quote_paths
from runtime.errors import UserError
from runtime.quiet import silence_libraries

ROOT = Path(__file__).resolve().parent.parent
#: Folders that contain no documents of this project.
ELSEWHERE = {".venv", "runs", "results", "node_modules", ".git", "outputs", "multirun", "wandb"}

_FENCE = re.compile(r"^ {0,3}```+\s*([\w-]*)")
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")
_CODE = re.compile(r"`([^`\n]+)`")
_SUBSTITUTION = re.compile(r"\$\([^()]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: number of its first line of code, from 1.
        language: text after the fence; "" for none.
    """

    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Document:
    """A Markdown file, split into prose and fenced blocks.

    Attributes:
        prose: its lines; lines of blocks are empty.
    """

    path: Path
    prose: tuple[str, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def read(cls, path: Path) -> Document:
        prose, blocks, inside = [], [], None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fence = _FENCE.match(line)
            if inside is None and fence:
                inside = (number + 1, fence[1], [])
            elif inside is not None and line.strip().startswith("```"):
                blocks.append(Block(inside[0], inside[1], "\n".join(inside[2]) + "\n"))
                inside = None
            elif inside is not None:
                inside[2].append(line)
            prose.append("" if inside is not None or fence else line)
        return cls(path, tuple(prose), tuple(blocks))

    @property
    def anchors(self) -> set[str]:
        """Anchors of the headings, as GitHub makes them, and explicit names."""
        result: dict[str, int] = {}
        for line in self.prose:
            if heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
                words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])).lower()
                slug = words.replace(" ", "-")
                result[slug] = result.get(slug, -1) + 1
        repeated = {f"{slug}-{number}" for slug, count in result.items() for number in range(1, count + 1)}
        named = re.findall(r"(?:id|name)=\"([^\"]+)\"", "\n".join(self.prose))
        return {*result, *repeated, *named}


def documents(root: Path) -> list[Document]:
    paths = (path for path in sorted(root.rglob("*.md")) if not ELSEWHERE & set(path.relative_to(root).parts))
    return [Document.read(path) for path in paths]


def link_problems(document: Document) -> Iterator[str]:
    """Relative links to files and headings that do not exist."""
    for number, line in enumerate(document.prose, 1):
        for link in _LINK.finditer(_CODE.sub("``", line)):
            target = link[1] or link[2]
            if re.match(r"[a-z][a-z0-9+.-]*:", target):  # an external address
                continue
            name, _, anchor = target.partition("#")
            place = (document.path.parent / name).resolve() if name else document.path
            if not place.exists():
                yield f"{number}: link to {target}: no such file"
            elif anchor and place.suffix == ".md" and anchor not in Document.read(place).anchors:
                yield f"{number}: link to {target}: no such heading"


def block_problems(document: Document) -> Iterator[str]:
    """Blocks that are invalid in their language, and commands in blocks that do not exist."""
    for block in document.blocks:
        if block.language in ("python", "py"):
            try:
                compile(block.text, str(document.path), "exec")
            except SyntaxError as error:
                yield f"{block.line + (error.lineno or 1) - 1}: Python does not parse: {error.msg}"
        shell = block.language in ("sh", "bash", "shell")
        if shell:
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            if done.returncode:
                yield f"{block.line}: the shell does not parse: {done.stderr.strip().splitlines()[0]}"
                continue
        if shell or not block.language:
            for number, line in joined_lines(block.text):
                if shell or line.startswith(("python ", "make ")):
                    yield from (f"{block.line + number}: {problem}" for problem in command_problems(line, document))


def prose_problems(document: Document) -> Iterator[str]:
    """Commands between backquotes that do not exist."""
    for number, line in enumerate(document.prose, 1):
        for code in _CODE.findall(line):
            if code.startswith(("python ", "make ")):
                yield from (f"{number}: {problem}" for problem in command_problems(code, document))


def joined_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of a shell text with their numbers from 0; lines that end in a backslash are joined with the next."""
    started, whole = 0, ""
    for number, line in enumerate(text.splitlines()):
        started = number if not whole else started
        whole += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield started, whole
            whole = ""


def command_problems(line: str, document: Document) -> Iterator[str]:
    """Problems of the commands `python FOLDER/FILE.py ...` and `make TARGET` in one line of a document.

    A config choice is also valid if the document tells the reader to write its YAML file.
    """
    for words in simple_commands(line):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        scripts = [at for at, word in enumerate(words) if at and re.fullmatch(r"\w+/\S*\.py", word)]
        if words[:1] == ["make"]:
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            yield from (f"make {target}: no such target" for target in targets if not exists_target(target))
        elif words[:1] and scripts and words[0] in ("python", "python3", "torchrun", "accelerate", "srun"):
            script = ROOT / words[scripts[0]]
            if not script.is_file():
                yield f"{words[scripts[0]]}: no such file"
            elif "run(main)" in script.read_text(encoding="utf-8"):
                problem = override_problem(tuple(words[scripts[0] + 1 :]))
                own = re.search(r"Could not find '([\w/]+)'", problem)
                if problem and not (own and f"configs/{own[1]}.yaml" in document.path.read_text(encoding="utf-8")):
                    yield f"{words[scripts[0]]}: {problem}"


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of every command of a line, separated at pipes and separators; none if the line is not valid shell."""
    lexer = shlex.shlex(_SUBSTITUTION.sub("VALUE", line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for word in lexer:
            if set(word) <= set("|&;<>"):
                yield words
                words = []
            else:
                words.append(word)
    except ValueError:
        return
    yield words


@cache
def exists_target(name: str) -> bool:
    return (
        bool(re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        or name.isupper()
    )


@cache
def override_problem(arguments: tuple[str, ...]) -> str:
    """Hydra's error for the overrides of a command; "" if they are valid, a sweep, or abbreviated."""
    if any(word.startswith(("-", "[")) or "…" in word or "..." in word or "=" not in word for word in arguments):
        return ""
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            compose("config", overrides=quote_paths(arguments))
    except (HydraException, OmegaConfBaseException, UserError) as error:
        return " ".join(str(error.__cause__ or error).split())[:200]
    return ""


def generated_problems(root: Path) -> Iterator[str]:
    """README.md and docs/results.md, if they differ from the current output of `make tables`."""
    published = root / "results" / PUBLISHED
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("README.md", fill_readme), ("docs/results.md", write_results)):
            copy = Path(folder) / Path(name).name
            shutil.copy(root / name, copy)
            write(published, copy)
            if copy.read_text(encoding="utf-8") != (root / name).read_text(encoding="utf-8"):
                yield f"{name}: its tables are not those of results/{PUBLISHED}: run `make tables`"


def problems(root: Path) -> Iterator[str]:
    for document in documents(root):
        for find in (link_problems, block_problems, prose_problems):
            yield from (f"{document.path.relative_to(root)}:{problem}" for problem in find(document))
    yield from generated_problems(root)


def main() -> None:
    silence_libraries()
    result = list(problems(ROOT))
    for problem in result:
        print(problem)
    print(f"{len(result)} problems in {len(documents(ROOT))} documents")
    sys.exit(1 if result else 0)


if __name__ == "__main__":
    main()
