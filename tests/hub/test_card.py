"""Card: what a push changes in a README, and what hostile metadata does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import InputError
from compress.hub.card import Changes, edited, fields, licence_of, metadata

README = "---\nlanguage: [en]\ntags: [gptq]\nmodel-index: [{name: x, results: []}]\n---\n# Mine\n\n---\nrule above\n"
APACHE = {"license": "apache-2.0"}


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, head, rest = text.split("---\n", 2)
    return yaml.safe_load(head), rest


def test_all_else_stays_as_it_is() -> None:
    head, text = parts(edited(README, Changes(APACHE, "org/base")))
    assert head == {
        "language": ["en"], "tags": ["gptq"], "model-index": [{"name": "x", "results": []}], "base_model": "org/base",
        "license": "apache-2.0",
    }  # fmt: skip
    assert text == "# Mine\n\n---\nrule above\n"
    assert edited(edited(README, Changes(APACHE)), Changes(APACHE)) == edited(README, Changes(APACHE))


def test_a_base_model_that_is_named_stays() -> None:
    text = "---\nbase_model: me/other\nlicense: mit\n---\n"
    assert metadata(text, Changes(APACHE, "org/base")) == {"base_model": "me/other", "license": "apache-2.0"}


def test_the_card_says_what_is_unverified_and_gated() -> None:
    _, text = parts(edited("# Mine\n", Changes(APACHE, "org/base", gated=True, verified=False)))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith(">")] == [
        "> **Unverified.** No reader's logits have been compared with what these weights mean.",
        "> The base model `org/base` is gated. Its terms hold for this model too; they are on its page.",
    ]
    assert lines[-1] == "# Mine"


@pytest.mark.parametrize(
    ("source", "known", "given", "wanted"),
    [
        (APACHE, None, "", APACHE),
        ({"license": ["mit", "bsd-3-clause"]}, "mit, bsd-3-clause", "", {"license": ["mit", "bsd-3-clause"]}),
        ({}, "llama3", "", {"license": "llama3"}),
        ({}, None, "mit", {"license": "mit"}),
        ({"license": "other", "license_name": "a", "license_link": "LICENSE"}, "a", "", {"license": "other", "license_name": "a", "license_link": "LICENSE"}),
        # What is no licence is none, and takes nothing else along.
        ({"license": "mit\nextra: x", "license_name": "y"}, None, "mit", {"license": "mit"}),
        ({"license": {"x": 1}}, "<script>", "mit", {"license": "mit"}),
        ({"license": "other", "license_name": "a\nb"}, None, "", {"license": "other"}),
        ({"license": "other", "license_link": "x" * 300}, None, "", {"license": "other"}),
    ],
)  # fmt: skip
def test_the_licence_of_the_source(source: dict[str, Any], known: str | None, given: str, wanted: dict[str, Any]) -> None:
    assert licence_of(source, {}, known, given) == (wanted, [])


def test_another_licence_than_the_source_is_a_problem() -> None:
    for own, given in (({}, "mit"), ({"license": "mit"}, "")):
        _, wrong = licence_of(APACHE, own, None, given)
        assert [problem.got for problem in wrong] == ["'mit'"]
    # The name that an older card gave as the licence itself.
    assert licence_of({"license": "other", "license_name": "tongyi"}, {"license": "tongyi"}, "tongyi", "")[1] == []


HOSTILE = (
    "---\na: [\n---\n",
    "---\n!!python/object/apply:os.system [ls]\n---\n",
    "---\n- a\n- b\n---\n",
    f"---\n{'[' * 5000}\n---\n",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metadata in YAML"):
        edited(text, Changes(APACHE))
    (tmp_path / "README.md").write_text(text)
    assert fields(tmp_path / "README.md") == {}
