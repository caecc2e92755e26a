"""Nothing in the repository is about the machine it was written on."""

import re

import pytest

from tests.house.sources import ROOT, project_files, shown

TEXT = {
    ".py",
    ".md",
    ".toml",
    ".cpp",
    ".hpp",
    ".h",
    ".cu",
    ".cuh",
    ".txt",
    ".json",
    ".jsonl",
    ".yml",
    ".yaml",
    ".cfg",
    ".sh",
    "",
}
# Written with character classes, so that this file does not match itself.
PATTERNS = {
    "a machine's path": r"(?<![\w./:~$}-])[/](?:home|Users|root|work|opt|mnt|workspace|scratch)/\w",
    "a package index": r"(?i)extra-index[-]url|--index[-]url|--find[-]links|file:/[/]/",
    "a private host": r"(?i)https?:/[/][\w.-]+\.(?:internal|local|lan|corp|intranet)\b",
    "a private address": r"\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2}[.:]\d+",
    "an emoji": "[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]",
}


def text_files():
    return [path for path in project_files() if path.suffix in TEXT]


@pytest.mark.parametrize("what", PATTERNS)
def test_no_file_has(what):
    pattern = re.compile(PATTERNS[what])
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{shown(path)}:{number} {match.group()}")
    assert found == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a machine's path", "open('/" + "home/someone/x')"),
        ("a machine's path", "#!/" + "root/env/python"),
        ("a package index", "pip install --index" + "-url x"),
        ("a private host", "https:/" + "/wheels.corp/simple"),
        ("a private address", "ssh 192.168." + "1.7:22"),
        ("an emoji", chr(0x1F680)),
    ],
)
def test_the_patterns_find_what_they_are_for(what, text):
    assert re.search(PATTERNS[what], text)


def test_the_root_holds_no_results_or_scratch():
    allowed = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"}
    allowed |= {"pyproject.toml", "setup.py"}
    assert {path.name for path in project_files() if path.parent == ROOT} <= allowed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_links_between_documents_lead_somewhere():
    dead = []
    for path in project_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
                if "://" not in target and not (path.parent / target).exists():
                    dead.append(f"{shown(path)}: {target}")
    assert dead == []


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    documents = [path for path in project_files() if path.is_relative_to(ROOT / "docs") and path.suffix == ".md"]
    unlisted = [path.relative_to(ROOT / "docs").as_posix() for path in documents]
    assert [name for name in unlisted if f"]({name})" not in index and name != "index.md"] == []
