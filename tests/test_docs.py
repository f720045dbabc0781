"""What code and pages cite exists: sections of docs/method.md, files, linked files and anchors."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("cmtmae_scale", "dataloading", "launchers", "configs", "tests")
CITATION = re.compile(r"docs/method\.md,\s+sections?\s+((?:\"[^\"]+\"(?:,\s+|\s+and\s+)?)+)")


def method_headings() -> set[str]:
    text = (ROOT / "docs" / "method.md").read_text()
    return set(re.findall(r"^#+ (.+)$", text, re.MULTILINE))


def citations() -> list[tuple[str, str]]:
    """File and section title of every citation; titles may be broken over lines."""
    found = []
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".py", ".yaml") or path == Path(__file__):
                continue
            for match in CITATION.finditer(path.read_text()):
                for title in re.findall(r"\"([^\"]+)\"", match[1]):
                    found.append((str(path.relative_to(ROOT)), " ".join(title.split())))
    return found


def test_files_that_pages_name_exist() -> None:
    tops = "tests|cmtmae_scale|dataloading|launchers|configs|docs|requirements"
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    pages.remove(ROOT / "CHANGELOG.md")  # which names files of its time
    named = [
        (page.name, name)
        for page in pages
        for name in re.findall(rf"(?<![\w./-])(?:{tops})/[\w./-]+\.\w+", page.read_text())
    ]
    assert len(named) > 100
    absent = [one for one in named if not (ROOT / one[1]).exists()]
    assert [one for one in absent if "NAME" not in one[1]] == []


def test_recipes_that_pages_run_exist() -> None:
    own = {"RECIPE", "photos.yaml", "recipe.yaml"}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"--config[ =]([\w./-]+)", page.read_text()):
            file = name if "/" in name else f"configs/{name}.yaml"
            assert name in own or (ROOT / file).is_file(), f"{page.name}: {name}"


def test_cited_sections_of_the_method_exist() -> None:
    cited, headings = citations(), method_headings()
    assert len(cited) > 30
    missing = [citation for citation in cited if citation[1] not in headings]
    assert not missing


def test_every_citation_of_the_method_names_the_page_in_the_repository() -> None:
    for folder in ("cmtmae_scale", "dataloading", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                assert "method.md" not in line or "docs/method.md" in line, f"{path}: {line}"


def test_links_and_anchors_of_the_method_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    anchors = {heading.lower().replace(" ", "-") for heading in method_headings()}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert any(target.startswith("#") for target in targets)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target).is_file(), target


def test_functions_and_files_that_the_method_names_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    sources = {
        path: path.read_text() for path in (ROOT / "cmtmae_scale").rglob("*.py") if path.is_file()
    }
    everything = "\n".join(sources.values())
    code = " ".join(re.findall(r"\*Code:\*(.*)", text))
    for name in re.findall(r"`([\w/.]+)`", code):
        if "/" in name and name.endswith((".py", "/")):
            assert (ROOT / "cmtmae_scale" / name).exists(), name
        elif "/" not in name:
            assert re.search(rf"(?:def|class) {name}\b", everything), name


def test_config_keys_that_the_method_names_exist() -> None:
    from cmtmae_scale.config.load import config_to_dict
    from cmtmae_scale.config.schema import Config

    groups = config_to_dict(Config())
    text = (ROOT / "docs" / "method.md").read_text()
    for key in set(re.findall(rf"`((?:{'|'.join(groups)})(?:\.\w+)+)(?:=[^`]*)?`", text)):
        group = groups
        for name in key.split("."):
            assert name in group, key
            group = group[name]
