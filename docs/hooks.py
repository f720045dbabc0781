"""Hooks of the docs' site (mkdocs.yml): pages and files that MkDocs does not find in ``docs/``."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/own_images.ipynb": "notebook.md",
}
"""Page in the repository -> its name in the site."""
SOURCES = {uri: source for source, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of ``PAGES``, notebooks as Markdown with the figures of their outputs."""
    for source, uri in PAGES.items():
        if source.endswith(".ipynb"):
            text, resources = MarkdownExporter().from_filename(str(ROOT / source))
            for name, content in resources["outputs"].items():
                files.append(File.generated(config, name, content=content))
        else:
            text = (ROOT / source).read_text()
        files.append(File.generated(config, uri, content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository by links within the site.

    A linked file that is outside of ``docs/`` and is no page is copied into ``repository/``.
    """
    uri = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def link_in_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[0]))
        if not (ROOT / path).is_file():
            return match[0]
        target = PAGES.get(path, path.removeprefix("docs/"))
        if target == path:
            target = f"repository/{path}"
            if target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        return posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(link_in_site, markdown)
