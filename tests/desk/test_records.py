"""Records: determinism, splits of schemas and values, objects that fit their schema and the paper they come from."""

import hashlib
import json
import re

import pytest

from mixtral.desk import world
from mixtral.desk.records import FIELDS, PAPERS, records, schema, schemas
from mixtral.desk.source import SPLITS, split_of

GOLDEN = {"train": "3625d703a4cfc09a", "validation": "19f049822c236b21", "test": "a5bae13d22f8c078"}
HELD_OUT_SPLITS = ("validation", "test")
TYPES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}


def documents(split, count=600, seed=3):
    return [records(seed, split, number) for number in range(count)]


def fits(value, wanted):
    """Whether a JSON value is what a schema of this module asks for, with all its fields."""
    if type(value) is not TYPES[wanted["type"]] or value not in wanted.get("enum", [value]):
        return False
    if wanted["type"] == "object":
        properties = wanted["properties"]
        return list(value) == list(properties) and all(fits(value[key], properties[key]) for key in properties)
    return wanted["type"] != "array" or all(fits(item, wanted["items"]) for item in value)


def leaves(record):
    """(field, value) of every plain field, nested ones included."""
    for field, value in record.items():
        yield from leaves(value) if isinstance(value, dict) else [(field, value)]


def belongs(inventory, value, split):
    """Whether a split may use a value: held-out ones only what the town has, training also what is invented for it."""
    return str(value) in world.items(inventory, split) or split == split_of("value", inventory, value) == "train"


def owners(record):
    """The splits that own the record's set of fields, over all papers that have these fields."""
    chosen = sorted(record)
    return {split_of("schema", paper, *chosen) for paper, (_, fields) in PAPERS.items() if set(chosen) <= set(fields)}


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_200_documents_are_frozen(split):
    text = json.dumps([[d.messages, d.answer, d.suite] for d in documents(split, 200)], ensure_ascii=False)
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == GOLDEN[split]


def test_a_document_depends_on_all_its_keys():
    assert records(1, "train", 5) == records(1, "train", 5)
    assert records(1, "train", 5) != records(2, "train", 5)
    assert records(1, "train", 5) != records(1, "train", 6)
    assert records(1, "train", 5).messages != records(1, "test", 5).messages


def test_every_paper_has_schemas_in_every_split_and_no_schema_in_two():
    for paper in PAPERS:
        sets = [set(schemas(paper, split)) for split in SPLITS]
        assert all(sets)
        assert sum(map(len, sets)) == len(set().union(*sets))
        assert all(3 <= len(fields) <= 6 for fields in set().union(*sets))


@pytest.mark.parametrize("split", SPLITS)
def test_schemas_stay_in_their_split(split):
    for document in documents(split):
        owner = split if document.suite == "records/schemas" else "train"
        assert owner in owners(document.answer["json"])
    suites = {document.suite for document in documents(split)}
    assert suites == ({"records/values"} if split == "train" else {"records/values", "records/schemas"})


@pytest.mark.parametrize("split", SPLITS)
def test_values_stay_in_their_split(split):
    seen = {"name": 0, "email": 0}
    for document in documents(split):
        for field, value in leaves(document.answer["json"]):
            if field in {"time", "room", "price", "code", "phone", "restaurant", "street", "city"}:
                assert belongs(field, value, split)
            elif field == "date":
                assert belongs("date", value.removeprefix("2026-"), split)
            elif field in seen:
                names, _, host = value.partition("@")
                first, last = names.replace(".", " ").title().split() if host else names.split()
                assert belongs("first_name", first, split)
                assert belongs("last_name", last, split)
                assert belongs("mail_host", host, split) or field == "name"
                seen[field] += 1
    assert min(seen.values()) > 50


def test_no_held_out_request_is_a_training_request():
    train = {document.messages[0]["content"] for document in documents("train", 3000)}
    for split in HELD_OUT_SPLITS:
        assert not [d for d in documents(split) if d.messages[0]["content"] in train]


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_the_object_alone_and_fits_the_schema(split):
    for document in documents(split):
        user, assistant = document.messages
        record = json.loads(assistant["content"])
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert record == document.answer["json"]
        assert assistant["content"] == json.dumps(record, ensure_ascii=False)
        assert fits(record, schema(tuple(record)))
        shown = re.search(r"^Schema: (\{.*\})$", user["content"], re.MULTILINE)
        if shown:
            assert fits(record, json.loads(shown[1]))
        else:
            assert all(re.search(rf"\b{field} [({{]", user["content"]) for field in record)


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_is_written_in_the_paper(split):
    for document in documents(split):
        said = document.messages[0]["content"]
        paper = "\n".join(part for part in said.split("\n\n") if not part.startswith("Schema:"))
        for field, value in leaves(document.answer["json"]):
            kind = FIELDS[field][0]
            if isinstance(value, list):
                assert len(set(value)) == len(value) >= 2
                assert ", ".join(value) in paper
            elif isinstance(value, bool) or " " in kind:
                _, *sentences = FIELDS[field][1][world.LANGUAGES.index(document.language)].split("|")
                place = (not value) if isinstance(value, bool) else kind.split().index(value)
                line = re.search(rf"^.*\b{re.escape(sentences[place][:-1])}", paper, re.MULTILINE | re.IGNORECASE)
                words = ("yes", "oui", "ja", "sí", "sì") if value is True else ("no", "non", "nein")
                assert line or (isinstance(value, bool) and any(re.search(rf"\b{word}\b", paper) for word in words))
            else:
                assert str(value) in paper, (paper, field, value)


def test_values_are_unambiguous():
    for document in documents("train", 2000):
        fields = [field for field, _ in leaves(document.answer["json"])]
        assert len(set(fields)) == len(fields)


def test_layouts_languages_and_field_kinds_all_occur():
    train = documents("train", 2000)
    texts = [document.messages[0]["content"] for document in train]
    assert abs(sum(document.language == "en" for document in train) / 2000 - 0.60) < 0.04
    assert {document.language for document in train} == set(world.LANGUAGES)
    assert abs(sum("Schema: {" in text for text in texts) / 2000 - 0.50) < 0.04
    for mark in ("\n- ", "*** ", "; ", " .... ", "\n\n"):
        assert sum(mark in text for text in texts) > 100
    kinds = {type(value) for document in train for value in document.answer["json"].values()}
    assert kinds == {str, int, bool, list, dict}
    assert {field for document in train for field, _ in leaves(document.answer["json"])} == set(FIELDS)


def test_the_schema_of_fields_is_plain_json_schema():
    assert schema(("nights", "breakfast", "payment", "dishes", "address")) == {
        "type": "object",
        "properties": {
            "nights": {"type": "integer"},
            "breakfast": {"type": "boolean"},
            "payment": {"type": "string", "enum": ["cash", "card"]},
            "dishes": {"type": "array", "items": {"type": "string"}},
            "address": {
                "type": "object",
                "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            },
        },
    }
