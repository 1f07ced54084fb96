"""The site also holds files from outside docs/; links to them work as they do in the repository."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "notebooks/*.ipynb",
    "benchmarks/results/*.md",
    "benchmarks/results/*.json*",
    "benchmarks/results/*.png",
)


@event_priority(100)  # before the plugin that renders notebooks looks for them
def on_files(files, config):
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links are written for the repository; on the site, docs/ is the top, and no sources are."""
    markdown = re.sub(r"\[([^\]]+)\]\([^)]+\.py\)", r"\1", markdown)
    up = "../" * page.file.src_uri.count("/")
    if (ROOT / "docs" / page.file.src_uri).exists():
        return re.sub(rf"\]\({up}\.\./(?!\.\.)", f"]({up}", markdown)
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
