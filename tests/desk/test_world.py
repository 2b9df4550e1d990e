"""The town: inventories and their splits, words with grammar, facts."""

import pytest

from mixtral.desk import world
from mixtral.desk.invented import INVENTORS
from mixtral.desk.source import SPLITS, Source, split_of


@pytest.mark.parametrize("inventory", sorted(world.INVENTORIES))
def test_every_item_belongs_to_one_split_and_every_split_has_two(inventory):
    parts = [world.items(inventory, split) for split in SPLITS]
    assert all(len(part) >= 2 for part in parts)
    assert sorted(item for part in parts for item in part) == sorted(world.INVENTORIES[inventory])
    assert len(set(world.INVENTORIES[inventory])) == len(world.INVENTORIES[inventory])


@pytest.mark.parametrize("inventory", sorted(world.INVENTORIES))
def test_draw_stays_in_its_split(inventory):
    source = Source("draw", inventory)
    for split in ("validation", "test"):
        drawn = {world.draw(inventory, source, split) for _ in range(300)}
        assert drawn <= set(world.items(inventory, split))
        assert len(drawn) >= 2
    drawn = [world.draw(inventory, source, "train") for _ in range(1000)]
    known = set(world.items(inventory, "train"))
    # Invented items would be of another split as often as any others, were they not drawn again.
    assert {split_of("value", inventory, item) for item in drawn} == {"train"}
    invented = sum(item not in known for item in drawn) / len(drawn)
    assert (
        abs(invented - (world.INVENTED_PERCENT / 100 if inventory in INVENTORS else 0)) < 0.06
    )  # some telephone numbers that are invented are known
    assert len(known.intersection(drawn)) >= 2


def test_most_of_the_open_items_are_invented():
    assert world.INVENTED_PERCENT == 70
    assert set(INVENTORS) < set(world.INVENTORIES)


def test_enough_names_are_held_out_for_a_score_to_be_of_more_than_a_handful():
    for inventory, least in {"first_name": 40, "last_name": 40, "city": 30, "restaurant": 30, "street": 20}.items():
        assert all(len(world.items(inventory, split)) >= least for split in ("validation", "test"))


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_things_of_training_are_mostly_invented_and_never_held_out(language):
    source = Source("nouns", language)
    drawn = [world.draw_noun("item", source, "train", language) for _ in range(1500)]
    words = {split: {world.word("item", key, language) for key in world.keys("item", split)} for split in SPLITS}
    invented = [noun for noun in drawn if noun.text not in words["train"]]
    assert abs(len(invented) / len(drawn) - world.INVENTED_PERCENT / 100) < 0.05
    assert not {noun.text for noun in drawn} & (words["validation"] | words["test"])
    assert len({noun.text for noun in invented}) > 900
    genders = {"en": {""}, "de": {"m", "f", "n"}}.get(language, {"m", "f"})
    assert {noun.gender for noun in invented} == genders
    assert {noun.text[0].isupper() for noun in invented} == {language == "de"}
    for split in ("validation", "test"):
        assert {world.draw_noun("item", source, split, language).text for _ in range(200)} <= words[split]


def test_an_invented_thing_that_is_a_held_out_one_is_drawn_again(monkeypatch):
    held_out = world.word("item", world.keys("item", "test")[0], "en")
    asked = iter([held_out.upper(), held_out, "blonk"])
    monkeypatch.setattr(world, "INVENTED_PERCENT", 100)
    monkeypatch.setattr(world, "invented_noun", lambda source, language: (next(asked), ""))
    assert world.draw_noun("item", Source("nouns"), "train", "en").text == "blonk"


def test_unknown_inventory_is_an_error():
    with pytest.raises(KeyError):
        world.draw("planets", Source("draw"), "train")


def test_split_tables_are_divided_and_the_others_are_shared():
    for table, rows in world.TABLES.items():
        parts = [world.keys(table, split) for split in SPLITS]
        if table in world.SPLIT_TABLES:
            assert all(len(part) >= 2 for part in parts)
            assert sorted(key for part in parts for key in part) == sorted(rows)
        else:
            assert all(part == tuple(rows) for part in parts)


def test_every_word_has_five_languages_and_countable_ones_a_gender():
    for table, rows in world.TABLES.items():
        for row in rows.values():
            assert set(row) == set(world.LANGUAGES)
            assert all(noun.text for noun in row.values())
            genders = {language: noun.gender for language, noun in row.items()}
            if table in {"item", "room_type", "place", "dish", "event"}:
                assert genders["de"] in {"m", "f", "n"}
                assert all(genders[language] in {"m", "f"} for language in ("fr", "es", "it"))


@pytest.mark.parametrize(
    ("table", "key", "language", "form", "expected"),
    [
        ("item", "umbrella", "en", "a", "an umbrella"),
        ("item", "scarf", "en", "a", "a scarf"),
        ("item", "scarf", "fr", "my", "mon écharpe"),
        ("item", "scarf", "fr", "the", "l'écharpe"),
        ("item", "key", "fr", "my", "ma clé"),
        ("place", "castle", "fr", "to", "au Château"),
        ("place", "castle", "fr", "of", "du Château"),
        ("place", "aquarium", "fr", "of", "de l'Aquarium"),
        ("place", "swimming_pool", "fr", "to", "à la Piscine"),
        ("item", "scarf", "de", "my", "meinen Schal"),
        ("item", "watch", "de", "my", "meine Uhr"),
        ("item", "book", "de", "a_acc", "ein Buch"),
        ("place", "botanical_garden", "de", "the", "der Botanische Garten"),
        ("place", "botanical_garden", "de", "to", "zum Botanischen Garten"),
        ("place", "old_mill", "de", "to", "zur Alten Mühle"),
        ("place", "castle", "es", "of", "del Castillo"),
        ("place", "swimming_pool", "es", "to", "a la Piscina"),
        ("item", "backpack", "it", "a", "uno zaino"),
        ("item", "backpack", "it", "the", "lo zaino"),
        ("item", "umbrella", "it", "the", "l'ombrello"),
        ("item", "key", "it", "my", "la mia chiave"),
        ("item", "ring", "it", "a", "un anello"),
        ("place", "aquarium", "it", "to", "all'Acquario"),
    ],
)
def test_articles(table, key, language, form, expected):
    assert world.forms(table, key, language)[form] == expected


def test_weekdays_dates_and_prices():
    assert [world.weekday("sunday", language, every=True) for language in world.LANGUAGES] == [
        "on Sundays", "le dimanche", "sonntags", "los domingos", "la domenica"]  # fmt: skip
    assert [world.weekday("monday", language, every=True) for language in ("es", "it")] == ["los lunes", "il lunedì"]
    assert [world.weekday("monday", language) for language in world.LANGUAGES] == [
        "on Monday", "lundi", "am Montag", "el lunes", "lunedì"]  # fmt: skip
    assert [world.date("03-14", language) for language in world.LANGUAGES] == [
        "14 March", "14 mars", "14. März", "14 de marzo", "14 marzo"]  # fmt: skip
    assert world.price("9", "de") == "9 Euro"
    assert world.price(9, "fr") == "9 euros"


def test_facts_have_one_answer_per_question_and_no_name_of_a_split():
    assert len(world.FACTS) >= 60
    assert world.FACTS["hours/maritime_museum"].values == {"open": "10:00", "close": "17:00"}
    assert sum(len(world.facts_of(kind)) for kind in {fact.kind for fact in world.FACTS.values()}) == len(world.FACTS)
    for key, fact in world.FACTS.items():
        assert fact.key == key
        assert fact.subject not in world.INVENTORIES["city"]
        for name, inventory in (("street", "street"), ("restaurant", "restaurant")):
            assert fact.values.get(name, "") not in world.INVENTORIES[inventory]
