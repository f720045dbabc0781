"""The check of the site's links finds planted mistakes and nothing else."""

from pathlib import Path

import pytest

from tests.site.check_links import find_broken_links

INTACT = """
<a href="#top" id="top"></a> <a href="other.html#there"></a> <a href="./"></a> <img src="a%20b.png">
<a href="https://example.org/#any"></a> <a href="mailto:a@example.org"></a>
"""


@pytest.mark.parametrize(
    "link",
    ["#absent", "other.html#absent", "absent.html", "absent.png", "/other.html", "../out.html"],
)
def test_a_link_without_file_or_anchor_is_broken(link: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "out.html").write_text("outside of the site")
    (site / "a b.png").write_bytes(b"")
    (site / "other.html").write_text("<h2 id='there'>")
    (site / "404.html").write_text("<a href='/served/anywhere.css'>")
    (site / "index.html").write_text(INTACT)
    assert find_broken_links(site) == []
    (site / "index.html").write_text(f"{INTACT}<a href='{link}'></a>")
    assert find_broken_links(site) == [f"index.html: {link}"]


def test_a_site_that_was_not_built_is_no_intact_site(tmp_path: Path) -> None:
    assert "build the site" in find_broken_links(tmp_path)[0]
