"""config/rocyard.yaml, .env.example and docs/settings.md say what the code does."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from manager.settings import FunctionSettings, Settings
from manager.settings_load import document_settings, load_settings
from manager.settings_sources import RESERVED_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
YAML = ROOT / "config" / "rocyard.yaml"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def uncommented() -> str:
    """The file with its examples in place of the empty mappings that they explain."""
    lines: list[str] = []
    in_example = False
    for line in YAML.read_text().splitlines():
        if in_example and not line.lstrip().startswith("#"):
            in_example = False
            assert line.endswith(": {}"), "an example is followed by the setting that it explains"
            continue
        if line.strip() == "# Example:":
            in_example = True
            continue
        lines.append(re.sub(r"^( *)# ", r"\1", line) if in_example else line)
    return "\n".join(lines)


def names_of(tree: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        names += names_of(value, f"{name}.") if isinstance(value, dict) and value else [name]
    return names


def any_name(name: str) -> str:
    return re.sub(r"(\.labels)\.[^.]+$", r"\1.NAME", re.sub(r"^(tenants|functions|groups)\.[^.]+", r"\1.NAME", name))


def test_the_yaml_holds_the_defaults():
    assert load_settings(YAML, {}, {}) == Settings()


def test_the_yaml_with_its_examples_holds_every_setting_and_nothing_else():
    tree = yaml.safe_load(uncommented())
    assert sorted(map(any_name, names_of(tree))) == sorted(doc.name for doc in document_settings())


def test_the_examples_are_right(folder: Path):
    (folder / "example.yaml").write_text(uncommented())
    settings = load_settings(folder / "example.yaml", {}, {})
    assert settings.tenants
    assert set(settings.functions["classify"].__struct_fields__) == set(FunctionSettings.__struct_fields__)


def test_each_setting_of_the_yaml_has_its_meaning_above_it():
    lines = [line.strip() for line in uncommented().splitlines()]
    bare = [line for above, line in itertools.pairwise(lines) if re.match(r"\w+: .", line) and above[:1] != "#"]
    assert not bare


def test_the_yaml_names_the_unit_of_each_number_that_has_one():
    text = uncommented()
    for doc in document_settings():
        if doc.unit:
            key = doc.name.rpartition(".")[2]
            comments = re.findall(rf"# ([^\n]*)\n\s*{key}:", text)
            assert comments
            assert all(doc.unit in comment or comment.startswith("As ") for comment in comments), doc.name


def test_the_document_lists_every_setting_as_it_is():
    rows = {
        match[1]: tuple(cell.strip(" `") for cell in match[0].strip("|").split("|"))
        for match in re.finditer(r"^\| `([a-zA-Z_.]+)` \|.*\|$", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    }
    expected = {doc.name: (doc.name, doc.variable, doc.default, doc.unit or "–") for doc in document_settings()}
    assert {name: row[:4] for name, row in rows.items()} == expected
    assert all(len(row) == 5 and len(row[4]) > 10 for row in rows.values()), "a row lacks its meaning"


def test_the_document_names_the_variables_that_are_no_settings():
    text = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in RESERVED_VARIABLES if f"`{name}`" not in text] == []


def test_the_example_of_dotenv_can_be_used(folder: Path):
    text = (ROOT / ".env.example").read_text()
    (folder / ".env").write_text(re.sub(r"^#(ROCYARD_)", r"\1", text, flags=re.MULTILINE))
    (folder / "secret").write_text("redis://h")
    (folder / "secret").chmod(0o600)
    assert "file:/run/secrets/rocyard-store-url" in text
    settings = load_settings(None, {"ROCYARD_STORE__URL": f"file:{folder}/secret"}, {})
    assert settings.log.format == "console"
