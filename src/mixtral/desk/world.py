"""The invented town of Marvena: names and values with their splits, translated words, and the facts of the town.

Three kinds of things:

* *inventories* hold names and values that are written alike in every language. Every item belongs to one split;
* *tables* hold words in five languages, with their gender where articles depend on it (``desk.words``);
* *facts* are the same in every document, so a question about the town has one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from mixtral.desk.invented import INVENTORS
from mixtral.desk.source import Source, Split, split_of
from mixtral.desk.words import (
    CURRENCY,
    LANGUAGES,
    SPLIT_TABLES,
    TABLES,
    Language,
    Noun,
    date,
    draw_key,
    forms,
    keys,
    price,
    weekday,
    word,
)

__all__ = [
    "CURRENCY",
    "FACTS",
    "HOTEL",
    "INVENTED_PERCENT",
    "INVENTORIES",
    "LANGUAGES",
    "SPLIT_TABLES",
    "TABLES",
    "TOWN",
    "Fact",
    "Language",
    "Noun",
    "date",
    "draw",
    "draw_key",
    "facts_of",
    "forms",
    "items",
    "keys",
    "price",
    "weekday",
    "word",
]

TOWN = "Marvena"
HOTEL = "Hotel Lindera"

# --- inventories: written alike in every language, each item in one split --------------------------------------------

_FIRST_NAMES = """
    Adele Agnes Alba Alessio Alice Amelie Andrea Anton Arthur Astrid Aurora Beatrice Benno Boris Bruno Camille Carla
    Carlos Carmen Celia Chiara Clara Claude Daniel Daria David Diego Dora Edgar Elena Elias Elisa Emil Emma Enzo
    Erik Estela Eva Fabio Felix Fiona Flora Franz Gabriel Gemma Georg Gina Greta Hanna Helena Hugo Ida Ines Irene
    Iris Ivan Jakob Jana Jonas Julia Julian Karin Karl Katrin Lara Laura Leo Lina Lorenzo Louise Luca Lucia Ludwig
    Luis Magda Manuel Marco Maria Marta Martin Matteo Max Mia Milan Mira Moritz Nadia Nico Nina Noah Nora Olga Oscar
    Otto Pablo Paul Paula Pia Rafael Renata Rita Robert Rosa Ruth Samuel Sara Silvia Simon Sofia Stella Teresa Theo
    Thomas Ugo Ursula Valeria Vera Victor Viola Walter
"""
_LAST_NAMES = """
    Abel Adler Albers Almeida Amaro Arnold Bach Bauer Becker Bellini Berger Bianchi Blanc Bonnet Brandt Bruni Calvo
    Campos Carter Castro Colin Conti Cooper Costa Cruz Dahl Delgado Diaz Dubois Duarte Eckert Esposito Evans Fabre
    Fischer Fontana Foster Franco Fuchs Gallo Garcia Gerber Girard Gomez Graf Greco Hall Hansen Hartmann Herrera
    Hoffmann Huber Jansen Keller Klein Koch Lambert Lang Leone Lindner Lopez Marchetti Marin Marino Martel Mason
    Mercier Meyer Molina Monti Moreau Moreno Moretti Morgan Nagel Navarro Neumann Novak Olsen Ortega Palmer Parker
    Pavese Perrin Petit Pinto Ponti Prado Quinn Ramos Renard Ricci Rinaldi Rivera Robin Romano Rossi Roussel Ruiz
    Sanders Santos Schmidt Serra Silva Simonet Soler Sommer Sorel Stein Tanner Torres Turner Valente Vega Vidal
    Vogel Wagner Weber Winter Wolf Zanetti Ziegler
"""
_STREETS = """
    Via Bassa|Via Salina|Via Lunga|Via Aurelia|Via Fontana|Via Stella|Via Olmo|Via Pino|Via Cedro
    Via Mirto|Via Remo|Via Porta|Via Forno|Via Quercia|Via Acero|Via Betulla|Via Ginestra|Via Viola
    Via Dalia|Via Iris|Via Giglio|Via Mimosa|Via Arno|Via Brezza|Via Canale|Via Castagno|Via Colle
    Via Corda|Via Duna|Via Edera|Via Fiume|Via Gabbiano|Via Garofano|Via Gelso|Via Genziana|Via Glicine
    Via Isola|Via Lago|Via Lavanda|Via Limone|Via Lupo|Via Malva|Via Mandorlo|Via Melo|Via Nespolo
    Via Noce|Via Onda|Via Orto|Via Palma|Via Pesca|Via Pioppo|Via Prato|Via Quarzo|Via Riva|Via Roccia
    Via Salice|Via Sambuco|Via Scala|Via Scoglio|Via Sole|Via Tramonto|Via Ulivo|Via Vento|Via Vigna
    Via Zaffiro
"""
_RESTAURANTS = """
    Calypso|Fenouil|Goldener Anker|La Cigala|Tre Gatti|Mirabelle|Blue Kettle|El Olivo|Zum Krug
    Osteria Nove|Red Lantern|La Brisa|Alte Post|Il Cortile|Chez Odile|Salt House|Casa Pilar|Drei Linden
    Da Renzo|The Copper Pot|Seeblick|Villa Rossa|Bistro Lune|Green Door|La Palma|Am Tor|Al Ponte|Le Canard
    El Patio|Sonnenhof|La Pergola|Les Halles|White Heron|La Ronda|Waldhaus|Piccolo Mondo|Harbour Inn
    La Sirena|Rosengarten|El Jilguero|Zur Mühle|La Tavola|Kupferkanne|Chez Basile|Blue Heron|El Mirador
    Il Gabbiano|Rote Laterne|La Marmite|Corner Table|La Despensa|Casa Blanca|La Fuente|Zum Anker|Il Forno
    Silver Spoon|Chez Margot|Am Markt|La Violette|El Rincon|Due Torri|Oak Table|Lindenhof|La Lanterna|Casa Nieves
    Petit Jardin|Blue Door|Bella Vista|Zum Hirsch
"""
_CITIES = """
    Alderno Barvik Belloro Brisanne Calmera Castrello Corvanne Dornau Elsberg Falmonte Feldara Grimau Halden
    Isolanda Jarnac Kelvane Lasterna Lindau Loreval Malverna Montelar Nerval Norhaven Oldera Orvanne Palmeras
    Pontevia Quintara Ravello Rosheim Salvera Santora Selbach Solvara Tarnow Tersina Ulmenau Valdoro Varnes Vellano
    Westmar Yverna Zellin Zorano Lindholm Marrow Bellver Torvane
"""
_MAIL_HOSTS = """
    post mail box letter inbox parcel stamp quill envelope courier pigeon sender reply note card page paper ink
    folder scroll memo message post-box mail-room letters office desk harbour bay coast island cliff dune river
"""


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for line in text.splitlines() for part in line.split("|") if part.strip())


def _codes() -> tuple[str, ...]:
    letters = "BCDFGHKLMNPRSTVWXZ"
    return tuple(f"{letters[n * 7 % 18]}{letters[n * 5 // 9 % 18]}{n * 37 % 90 + 10}" for n in range(400))


INVENTORIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "first_name": tuple(_FIRST_NAMES.split()),
        "last_name": tuple(_LAST_NAMES.split()),
        "street": _split_names(_STREETS),
        "restaurant": _split_names(_RESTAURANTS),
        "city": tuple(_CITIES.split()),
        "mail_host": tuple(f"{name}.example" for name in _MAIL_HOSTS.split()),
        "phone": tuple(f"555 {n * 7919 % 9000 + 1000}" for n in range(400)),
        "time": tuple(f"{minute // 60:02d}:{minute % 60:02d}" for minute in range(6 * 60, 24 * 60, 5)),
        "date": tuple(f"{month:02d}-{day:02d}" for month in range(1, 13) for day in range(2, 29)),
        "price": tuple(str(n) for n in range(5, 400)),
        "room": tuple(f"{floor}{door:02d}" for floor in range(1, 7) for door in range(1, 31)),
        "house": tuple(str(n) for n in range(2, 120)),
        "code": tuple(dict.fromkeys(_codes())),
    }
)
"""Names and values by inventory. ``date`` items are ``MM-DD``; ``price`` items are whole euros."""

INVENTED_PERCENT = 70
"""How many training items of an open inventory are invented instead of taken from it."""


@cache
def items(inventory: str, split: Split) -> tuple[str, ...]:
    """The items of an inventory that belong to ``split``; KeyError for an unknown inventory."""
    return tuple(item for item in INVENTORIES[inventory] if split_of("value", inventory, item) == split)


def draw(inventory: str, source: Source, split: Split) -> str:
    """One item of an inventory, from the items of ``split`` alone; KeyError for an unknown inventory.

    In training, ``INVENTED_PERCENT`` of the items of open inventories are invented; none belongs to another split.
    """
    if split == "train" and inventory in INVENTORS and source.chance(INVENTED_PERCENT):
        while True:
            item = INVENTORS[inventory](source)
            if split_of("value", inventory, item) == split:
                return item
    return source.pick(items(inventory, split))


# --- facts: the same in every document -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: ``kind`` names its phrasing, ``subject`` is a key (place, cuisine, room type, city) or empty.

    ``values`` are named, language-independent strings; a name ending in ``_day`` holds a weekday key, one ending in
    ``_price`` whole euros, any other is shown as it is.
    """

    kind: str
    subject: str
    values: Mapping[str, str]

    @property
    def key(self) -> str:
        """``kind`` or ``kind/subject``, unique among the facts."""
        return f"{self.kind}/{self.subject}" if self.subject else self.kind


# place: opens, closes, closed weekday, ticket in euros, street
_PLACES = """
    maritime_museum 10:00 17:00 monday 9 Via Marina
    clock_museum 11:00 18:00 tuesday 7 Via Torre
    glass_museum 09:30 16:30 wednesday 6 Via Perla
    castle 09:00 19:00 monday 12 Via Alta
    lighthouse 14:00 20:00 thursday 4 Via Faro
    botanical_garden 08:00 21:00 friday 5 Via Camelia
    aquarium 10:30 18:30 tuesday 15 Via Corallo
    town_library 08:30 19:30 sunday 2 Via Antica
    market_hall 07:00 13:00 sunday 11 Via Mercato
    puppet_theatre 15:00 22:00 monday 8 Via Teatro
    old_mill 12:00 16:00 saturday 3 Via Mulino
    swimming_pool 06:30 21:30 wednesday 10 Via Ancora
"""
_KITCHENS = """
    italian Trattoria Luna|Via Luna
    french Le Petit Quai|Via Molo
    spanish Casa Rocio|Via Vela
    indian Saffron Garden|Via Verde
    japanese Sakura|Via Rosa
    greek Taverna Delos|Via Ponte
    vegetarian Verdura|Via Tiglio
    mexican Agave|Via Corta
"""
# city: morning train, evening train, platform
_TRAINS = """
    Arlenne 07:12 18:42 1
    Bergone 08:05 19:20 2
    Costaro 06:48 17:35 3
    Dalvik 09:15 20:10 4
    Estrana 07:50 16:55 5
    Fontille 08:33 21:05 6
    Grunau 10:20 19:55 7
    Havelin 06:25 18:15 8
"""
_ROOM_PRICES = {"single_room": "70", "double_room": "110", "family_room": "150", "suite": "220"}
_HOTEL_FACTS: dict[str, dict[str, str]] = {
    "breakfast": {"open": "07:00", "close": "10:30"},
    "check_in": {"time": "15:00"},
    "check_out": {"time": "11:00"},
    "wifi": {"network": "Lindera-Guest", "password": "seagull42"},
    "parking": {"ticket_price": "18"},
    "luggage": {"open": "06:00", "close": "22:00"},
    "pets": {"ticket_price": "20"},
    "tram": {"line": "3", "street": "Via Grande"},
    "pharmacy": {"street": "Via Lauro", "close": "20:00"},
}


def _facts() -> tuple[Fact, ...]:
    found: list[Fact] = []

    def add(kind: str, subject: str, **values: str) -> None:
        found.append(Fact(kind, subject, MappingProxyType(values)))

    for line in _PLACES.strip().splitlines():
        place, opens, closes, day, ticket, street = line.split(maxsplit=5)
        add("hours", place, open=opens, close=closes)
        add("closed", place, closed_day=day)
        add("ticket", place, ticket_price=ticket)
        add("where", place, street=street)
    for line in _KITCHENS.strip().splitlines():
        cuisine, rest = line.split(maxsplit=1)
        name, street = rest.split("|")
        add("cuisine", cuisine, restaurant=name, street=street)
    for line in _TRAINS.strip().splitlines():
        city, morning, evening, platform = line.split()
        add("train", city, morning=morning, evening=evening, platform=platform)
    for room, amount in _ROOM_PRICES.items():
        add("room_price", room, ticket_price=amount)
    for kind, values in _HOTEL_FACTS.items():
        add(kind, "", **values)
    return tuple(found)


FACTS: Mapping[str, Fact] = MappingProxyType({fact.key: fact for fact in _facts()})
"""All facts of the town by key, for example ``hours/castle`` or ``wifi``."""


@cache
def facts_of(kind: str) -> tuple[Fact, ...]:
    """The facts of one kind, in table order; empty for an unknown kind."""
    return tuple(fact for fact in FACTS.values() if fact.kind == kind)
