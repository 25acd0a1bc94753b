"""Hooks of `make docs`: pages that are kept outside of docs/, and links that work on GitHub and on the site.

In the repository every link is relative to its file. On the site a link to a page of the site leads there; a link to
another file of the repository becomes its path as text. A link to a file that does not exist stops the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = {  # page of the site: file of the repository
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
ALSO_CHECKED = ("docker/README.md", "slurm/README.md")
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def site_path(path: str) -> str | None:
    """Return the site's path of a file of the repository; None if the site does not have it."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/plots/"):
        return path.removeprefix("benchmarks/")
    return next((page for page, file in PAGES.items() if file == path), None)


def rewrite_links(markdown: str, source: str, page: str) -> str:
    """Return `markdown` of the file `source` with links for the site's `page`."""

    def rewrite(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(f"{Path(source).parent}/{target}")
        if not (REPOSITORY / path).exists():
            raise PluginError(f"{source}: broken link {match['target']}")
        if (on_site := site_path(path)) is None:
            return f"{match['text']} (`{path}`)" if match["text"].strip("`") != path else f"`{path}`"
        relative = os.path.relpath(on_site, Path(page).parent)
        return f"{match['image']}[{match['text']}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, markdown)


def on_files(files, config):
    """Add the pages and plots that are kept outside of docs/; check the links of pages that the site lacks."""
    for page, file in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / file)))
    for plot in sorted((REPOSITORY / "benchmarks" / "plots").iterdir()):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    for source in ALSO_CHECKED:
        rewrite_links((REPOSITORY / source).read_text(encoding="utf-8"), source, source)
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page."""
    path = page.file.src_uri
    return rewrite_links(markdown, PAGES.get(path, f"docs/{path}"), path)
