"""The real example's data code, on tarballs and drawings that the tests write themselves."""

import base64
import hashlib
import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("resvg_py", reason="the extra [real] is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real"
sys.path.insert(0, str(EXAMPLE))

import names as things  # noqa: E402
import records  # noqa: E402
import registries  # noqa: E402
import sources  # noqa: E402
from baselines import NEAREST, pixel_baselines  # noqa: E402
from canvas import Placed, compose, varied  # noqa: E402
from drawings import Concept, IconSet, read_concepts, render_svg  # noqa: E402

from mono_internvl.data.sources import read_meta  # noqa: E402

CIRCLE = '<circle cx="8" cy="8" r="6" fill="{}"/>'


def tarball() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    return packed.getvalue()


def registry_of(monkeypatch: pytest.MonkeyPatch, content: bytes, served: bytes) -> list[str]:
    """A registry with one package; returns the addresses that are read."""
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    dist = {"tarball": "https://r/p.tgz", "integrity": f"sha512-{digest}"}
    read: list[str] = []

    def answer(url: str) -> bytes:
        read.append(url)
        return served if url.endswith(".tgz") else json.dumps({"dist": dist}).encode()

    monkeypatch.setattr(registries, "_read", answer)
    return read


def test_npm_package_is_checked_unpacked_and_kept(tmp_path, monkeypatch) -> None:
    read = registry_of(monkeypatch, tarball(), tarball())
    folder = registries.fetch_npm("@a/b", "1.0", tmp_path, "https://r")
    assert (folder / "icons.json").read_text() == "{}"
    assert read == ["https://r/@a%2fb/1.0", "https://r/p.tgz"]
    assert registries.fetch_npm("@a/b", "1.0", tmp_path, "https://r") == folder
    assert len(read) == 2


def test_npm_package_that_was_changed_is_refused(tmp_path, monkeypatch) -> None:
    registry_of(monkeypatch, tarball(), tarball() + b"x")
    with pytest.raises(registries.Unreachable, match="damaged on the way"):
        registries.fetch_npm("@a/b", "1.0", tmp_path, "https://r")
    assert not list((tmp_path / "npm").glob("*")) if (tmp_path / "npm").exists() else True


def test_package_without_a_digest_is_refused() -> None:
    with pytest.raises(registries.Unreachable, match="no digest"):
        registries.check_integrity(b"x", {}, "p")


def test_canvas_puts_transparent_pictures_on_white() -> None:
    picture = render_svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{CIRCLE.format("red")}</svg>'
    )
    image = compose([Placed(picture)], 112)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((56, 56)) == (255, 0, 0)
    corner = compose([Placed(varied(picture, random.Random(0)), 1.0, 1.0, 1.0)], 112)
    assert corner.size == (112, 112)


def test_icon_set_follows_aliases_and_names(tmp_path: Path) -> None:
    icons = {"sun": {"body": CIRCLE.format("red")}}
    aliases = {"star": {"parent": "sun"}}
    text = json.dumps({"icons": icons, "aliases": aliases, "width": 16, "height": 16})
    (tmp_path / "icons.json").write_text(text)
    drawn = IconSet(tmp_path)
    assert drawn.picture(Concept("2b50", "star", "g", "s")) is not None
    assert drawn.picture(Concept("1f431", "cat", "g", "s")) is None
    (tmp_path / "chars.json").write_text(json.dumps({"1f31e-fe0f": "sun"}))
    assert IconSet(tmp_path).has(Concept("1f31e", "another name", "g", "s"))


@pytest.mark.parametrize(
    "title, name",
    [("fuji apple", "red apple"), ("hot air balloon", None), ("bee", "honeybee"), ("tree", None)],
)
def test_titles_name_known_things_alone(title: str, name: str | None) -> None:
    assert things.thing_in(title, list(things.FORTY)) == name


def write_packages(cache: Path) -> None:
    """Tiny packages in the form of the real ones: every thing is a circle of its own colour."""
    rng = random.Random(0)
    named = (*things.FORTY, *things.NEVER_NAMED)
    rows = [
        {
            "hexcode": f"{0x1F000 + number:X}",
            "annotation": name,
            "group": "animals-nature",
            "subgroups": "animal-mammal",
            "skintone": "",
            "tags": "",
        }
        for number, name in enumerate(named)
    ]
    table = cache / "npm" / f"openmoji-{sources.NAMES.version}" / "data" / "openmoji.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(rows))
    for package in sources.ARTISTS.values():
        name = package.name.strip("@").replace("/", "-")
        folder = cache / "npm" / f"{name}-{package.version}"
        folder.mkdir()
        icons = {
            row["annotation"]: {"body": CIRCLE.format(f"#{rng.randrange(1 << 24):06x}")}
            for row in rows
        }
        (folder / "icons.json").write_text(json.dumps({"icons": icons}))
        codes = {row["hexcode"].lower(): row["annotation"] for row in rows}
        (folder / "chars.json").write_text(json.dumps(codes))


def test_data_folder_keeps_its_splits(tmp_path: Path, monkeypatch) -> None:
    def no_apt(name: str, cache: Path) -> Path:
        raise registries.Unreachable(f"{name}: no apt-get on this machine")

    monkeypatch.setattr(sources, "fetch_debian", no_apt)
    write_packages(tmp_path / "cache")
    out = tmp_path / "data"
    size = records.Size(variants=1, composed=12, held_out_composed=2, px=56)
    counts = records.make_data(out, tmp_path / "cache", size)
    assert records.make_data(out, tmp_path / "cache", size) == counts
    with pytest.raises(ValueError, match="another size"):
        records.make_data(out, tmp_path / "cache", records.Size(variants=2))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="something else"):
        records.make_data(foreign, tmp_path / "cache", size)
    assert (foreign / "mine.txt").read_text() == "kept"
    held_out = [json.loads(line) for line in (out / "heldout.jsonl").open()]
    trained: set[str] = set()
    for stage in records.STAGES:
        (source,) = read_meta(out / f"{stage}.json")
        for index in range(len(source)):
            record = source.record(index)
            trained.update(str(record.fields["image"]).split())
            said = record.turns[-1].text
            assert not any(name == said for name in things.NEVER_NAMED)
    assert not trained & {record["image"] for record in held_out}
    assert {r["artist"] for r in held_out if r["kind"] == "noto"} == {"noto"}
    assert counts["heldout: never named"] == 2 * len(things.NEVER_NAMED)
    assert "openclipart" not in (out / "LICENSES.md").read_text()
    assert json.loads((out / "data.json").read_text())["left_out"]
    assert len(read_concepts(tmp_path / "cache" / "npm" / "openmoji-17.0.0")) == 60


def test_pixel_baselines_name_what_pixels_tell(tmp_path: Path) -> None:
    shown = [(f"{name}.png", name) for name in ("red", "blue")]
    for file, colour in shown:
        Image.new("RGB", (20, 20), colour).save(tmp_path / file)
    reached = pixel_baselines(tmp_path, [shown], {"all": shown, "none": [("red.png", "blue")]})
    assert reached["all"] == dict.fromkeys(reached["all"], 1.0)
    assert reached["none"][NEAREST] == 0.0
