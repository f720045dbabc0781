"""Check that each link within the built site has its file and its anchor; run by ``make docs``.

MkDocs checks the links of Markdown, not those of HTML.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Links(HTMLParser):
    """Collect what a page links to and which anchors it has."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.targets.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value or "")


def read_page(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text())
    return links


def find_broken_links(site: Path) -> list[str]:
    """Return ``page: link`` of each link to a file or an anchor that is not in the site.

    ``404.html`` is excluded: it is served for any address, so its links name the host's root.
    """
    site = site.resolve()
    pages = {path: read_page(path) for path in sorted(site.rglob("*.html"))}
    pages.pop(site / "404.html", None)
    if site / "index.html" not in pages:
        return [f"{site}: no index.html; build the site first"]
    broken = []
    for path, page in pages.items():
        for link in page.targets:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if target.is_dir():
                target /= "index.html"
            anchors = pages[target].anchors if target in pages else set()
            inside = target.is_relative_to(site) and target.is_file()
            if not inside or unquote(url.fragment) not in {*anchors, ""}:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


if __name__ == "__main__":
    broken = find_broken_links(Path(sys.argv[1]))
    print("\n".join(f"broken link: {line}" for line in broken) or "every link of the site resolves")
    sys.exit(bool(broken))
