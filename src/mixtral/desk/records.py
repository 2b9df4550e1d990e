"""Records: a booking mail, receipt, letter or note and a list of fields; the answer is the JSON object alone.

A schema is a set of fields of one kind of paper. The set belongs to a split, so held-out documents have either known
schemas with held-out values (``records/values``) or held-out schemas (``records/schemas``).
"""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from typing import Any

from mixtral.desk import world
from mixtral.desk.source import Document, Source, Split, split_of
from mixtral.desk.world import LANGUAGES, Language

__all__ = ["FIELDS", "PAPERS", "records", "schema", "schemas"]

# paper -> (titles en fr de es it, fields)
PAPERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "booking": (("Booking", "Réservation", "Buchung", "Reserva", "Prenotazione"),
                ("name", "date", "nights", "guests", "room_type", "breakfast", "price", "code", "contact")),
    "table": (("Table", "Table", "Tisch", "Mesa", "Tavolo"),
              ("name", "restaurant", "date", "time", "guests", "seat", "dishes", "contact", "phone")),
    "receipt": (("Receipt", "Reçu", "Quittung", "Recibo", "Ricevuta"),
                ("restaurant", "date", "time", "dishes", "price", "payment", "paid", "code", "address")),
    "lost": (("Lost property", "Objet perdu", "Verlorene Sache", "Objeto perdido", "Oggetto smarrito"),
             ("name", "item", "day", "date", "place", "found", "room", "phone", "contact")),
    "trip": (("Trip", "Voyage", "Reise", "Viaje", "Viaggio"),
             ("name", "city", "day", "time", "class", "guests", "price", "paid", "code", "email")),
    "event": (("Event", "Événement", "Veranstaltung", "Evento", "Evento"),
              ("event", "day", "date", "time", "street", "price", "breakfast", "guests", "email", "languages")),
}  # fmt: skip
"""Kinds of paper with their title in each language and the fields that schemas choose from."""

# field -> (kind, per language "label|sentence"); yes-or-no fields and fixed choices list a sentence per value
FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "name": ("name", ("Name|My name is {}.", "Nom|Je m'appelle {}.", "Name|Mein Name ist {}.", "Nombre|Me llamo {}.",
                      "Nome|Mi chiamo {}.")),
    "date": ("date", ("Date|The date is {}.", "Date|La date est le {}.", "Datum|Das Datum ist der {}.",
                      "Fecha|La fecha es el {}.", "Data|La data è il {}.")),
    "day": ("day", ("Day|It is on {}.", "Jour|C'est {}.", "Tag|Es ist am {}.", "Día|Es el {}.", "Giorno|È {}.")),
    "time": ("time", ("Time|It is at {}.", "Heure|C'est à {}.", "Uhrzeit|Es ist um {} Uhr.", "Hora|Es a las {}.",
                      "Ora|È alle {}.")),
    "nights": ("few", ("Nights|It is for {} nights.", "Nuits|C'est pour {} nuits.", "Nächte|Es ist für {} Nächte.",
                       "Noches|Es para {} noches.", "Notti|È per {} notti.")),
    "guests": ("few", ("People|There are {} people.", "Personnes|Il y a {} personnes.", "Personen|Es sind {} Personen.",
                       "Personas|Son {} personas.", "Persone|Sono {} persone.")),
    "price": ("price", ("Price|The price is {} euros.", "Prix|Le prix est de {} euros.", "Preis|Der Preis ist {} Euro.",
                        "Precio|El precio es de {} euros.", "Prezzo|Il prezzo è di {} euro.")),
    "room": ("room", ("Room|It is room {}.", "Chambre|C'est la chambre {}.", "Zimmer|Es ist Zimmer {}.",
                      "Habitación|Es la habitación {}.", "Camera|È la camera {}.")),
    "code": ("code", ("Code|The code is {}.", "Code|Le code est {}.", "Code|Der Code ist {}.",
                      "Código|El código es {}.",
                      "Codice|Il codice è {}.")),
    "phone": ("phone", ("Phone|The phone number is {}.", "Téléphone|Le numéro de téléphone est {}.",
                        "Telefon|Die Telefonnummer ist {}.", "Teléfono|El teléfono es {}.",
                        "Telefono|Il numero di telefono è {}.")),
    "email": ("email", ("E-mail|The e-mail is {}.", "E-mail|L'e-mail est {}.", "E-Mail|Die E-Mail ist {}.",
                        "Correo|El correo es {}.", "E-mail|L'e-mail è {}.")),
    "restaurant": ("restaurant", ("Restaurant|The restaurant is {}.", "Restaurant|Le restaurant est {}.",
                                  "Restaurant|Das Restaurant ist {}.", "Restaurante|El restaurante es {}.",
                                  "Ristorante|Il ristorante è {}.")),
    "street": ("street", ("Street|The street is {}.", "Rue|La rue est {}.", "Straße|Die Straße ist {}.",
                          "Calle|La calle es {}.", "Via|La via è {}.")),
    "city": ("city", ("City|The city is {}.", "Ville|La ville est {}.", "Stadt|Die Stadt ist {}.",
                      "Ciudad|La ciudad es {}.", "Città|La città è {}.")),
    "place": ("place", ("Place|The place is: {}.", "Lieu|Le lieu : {}.", "Ort|Der Ort ist: {}.",
                        "Lugar|El lugar es: {}.",
                        "Luogo|Il luogo è: {}.")),
    "item": ("item", ("Item|The item is: {}.", "Objet|L'objet : {}.", "Gegenstand|Der Gegenstand ist: {}.",
                      "Objeto|El objeto es: {}.", "Oggetto|L'oggetto è: {}.")),
    "event": ("event", ("Event|The event is: {}.", "Événement|L'événement : {}.",
                        "Veranstaltung|Die Veranstaltung ist: {}.",
                        "Evento|El evento es: {}.", "Evento|L'evento è: {}.")),
    "dishes": ("dishes", ("Dishes|The dishes are: {}.", "Plats|Les plats sont : {}.", "Gerichte|Die Gerichte sind: {}.",
                          "Platos|Los platos son: {}.", "Piatti|I piatti sono: {}.")),
    "languages": ("languages", ("Languages|The languages are: {}.", "Langues|Les langues sont : {}.",
                                "Sprachen|Die Sprachen sind: {}.", "Idiomas|Los idiomas son: {}.",
                                "Lingue|Le lingue sono: {}.")),
    "breakfast": ("bool", ("Breakfast|With breakfast.|Without breakfast.",
                           "Petit déjeuner|Avec petit déjeuner.|Sans petit déjeuner.",
                           "Frühstück|Mit Frühstück.|Ohne Frühstück.", "Desayuno|Con desayuno.|Sin desayuno.",
                           "Colazione|Con colazione.|Senza colazione.")),
    "paid": ("bool", ("Paid|It is paid.|It is not paid.", "Payé|C'est payé.|Ce n'est pas payé.",
                      "Bezahlt|Es ist bezahlt.|Es ist nicht bezahlt.", "Pagado|Está pagado.|No está pagado.",
                      "Pagato|È pagato.|Non è pagato.")),
    "found": ("bool", ("Found|It was found.|It was not found.", "Trouvé|On l'a trouvé.|On ne l'a pas trouvé.",
                       "Gefunden|Es wurde gefunden.|Es wurde nicht gefunden.",
                       "Encontrado|Está encontrado.|No está encontrado.",
                       "Trovato|È stato trovato.|Non è stato trovato.")),
    "room_type": ("single double family suite",
                  ("Room type|A single room.|A double room.|A family room.|A suite.",
                   "Type de chambre|Une chambre simple.|Une chambre double.|Une chambre familiale.|Une suite.",
                   "Zimmerart|Ein Einzelzimmer.|Ein Doppelzimmer.|Ein Familienzimmer.|Eine Suite.",
                   "Tipo de habitación|Una habitación individual.|Una doble.|Una familiar.|Una suite.",
                   "Tipo di camera|Una camera singola.|Una camera doppia.|Una camera familiare.|Una suite.")),
    "seat": ("inside outside", ("Seat|A table inside.|A table outside.",
                                "Place|Une table à l'intérieur.|Une table en terrasse.",
                                "Platz|Ein Tisch drinnen.|Ein Tisch draußen.", "Sitio|Una mesa dentro.|Una mesa fuera.",
                                "Posto|Un tavolo dentro.|Un tavolo fuori.")),
    "payment": ("cash card", ("Payment|By cash.|By card.", "Paiement|En espèces.|Par carte.",
                              "Zahlung|In bar.|Mit Karte.",
                              "Pago|En efectivo.|Con tarjeta.", "Pagamento|In contanti.|Con carta.")),
    "class": ("first second", ("Class|First class.|Second class.", "Classe|Première classe.|Deuxième classe.",
                               "Klasse|Erste Klasse.|Zweite Klasse.", "Clase|Primera clase.|Segunda clase.",
                               "Classe|Prima classe.|Seconda classe.")),
}  # fmt: skip
"""Every plain field: its kind of value, and a label with a sentence (one per value for fixed choices) per language."""

_NESTED = {"contact": ("phone", "email"), "address": ("street", "city")}
_INTEGERS = frozenset({"few", "price", "room"})
_LISTS = frozenset({"dishes", "languages"})
_YES = ("yes|no", "oui|non", "ja|nein", "sí|no", "sì|no")
_SPOKEN = ("English|French|German|Spanish|Italian", "anglais|français|allemand|espagnol|italien",
           "Englisch|Französisch|Deutsch|Spanisch|Italienisch", "inglés|francés|alemán|español|italiano",
           "inglese|francese|tedesco|spagnolo|italiano")  # fmt: skip
_OPENINGS = (
    "Hello,|Dear team,|Good morning,|Dear Sir or Madam,", "Bonjour,|Chère équipe,|Bonsoir,|Madame, Monsieur,",
    "Hallo,|Liebes Team,|Guten Tag,|Sehr geehrte Damen und Herren,",
    "Hola:|Estimado equipo:|Buenos días:|Estimados señores:", "Salve,|Gentile team,|Buongiorno,|Gentili signori,",
)  # fmt: skip
_CLOSINGS = (
    "Kind regards|Thank you|Many thanks", "Cordialement|Merci|Merci beaucoup", "Viele Grüße|Danke|Vielen Dank",
    "Saludos|Gracias|Muchas gracias", "Cordiali saluti|Grazie|Molte grazie",
)  # fmt: skip
_TASKS = (
    "Extract the data as JSON.|Return the fields as JSON.|Read the text and answer with JSON only.|"
    "Make a JSON object from this text.|Fill in the fields as JSON.|Write the data as a JSON object.|"
    "Give me the JSON for this text.|Turn this text into JSON.",
    "Extrais les données en JSON.|Renvoie les champs en JSON.|Lis le texte et réponds en JSON seulement.|"
    "Fais un objet JSON de ce texte.|Remplis les champs en JSON.|Écris les données comme objet JSON.|"
    "Donne-moi le JSON de ce texte.|Transforme ce texte en JSON.",
    "Gib die Daten als JSON aus.|Gib die Felder als JSON zurück.|Lies den Text und antworte nur mit JSON.|"
    "Mach aus diesem Text ein JSON-Objekt.|Fülle die Felder als JSON aus.|Schreibe die Daten als JSON-Objekt.|"
    "Gib mir das JSON zu diesem Text.|Wandle diesen Text in JSON um.",
    "Extrae los datos como JSON.|Devuelve los campos como JSON.|Lee el texto y responde solo con JSON.|"
    "Haz un objeto JSON de este texto.|Rellena los campos como JSON.|Escribe los datos como objeto JSON.|"
    "Dame el JSON de este texto.|Convierte este texto en JSON.",
    "Estrai i dati come JSON.|Restituisci i campi come JSON.|Leggi il testo e rispondi solo con JSON.|"
    "Fai un oggetto JSON da questo testo.|Compila i campi come JSON.|Scrivi i dati come oggetto JSON.|"
    "Dammi il JSON di questo testo.|Trasforma questo testo in JSON.",
)
_FIELDS_WORD = ("Fields", "Champs", "Felder", "Campos", "Campi")


def _leaves(field: str) -> tuple[str, ...]:
    return _NESTED.get(field, (field,))


@cache
def schemas(paper: str, split: Split) -> tuple[tuple[str, ...], ...]:
    """The sets of 3 to 6 fields of a paper that belong to ``split``; KeyError for an unknown paper."""
    fields = PAPERS[paper][1]
    found = []
    for count in range(3, 7):
        for chosen in combinations(fields, count):
            leaves = [leaf for field in chosen for leaf in _leaves(field)]
            distinct = len(set(leaves)) == len(leaves) <= 6
            if distinct and split_of("schema", paper, *sorted(chosen)) == split:
                found.append(chosen)
    return tuple(found)


def schema(fields: tuple[str, ...]) -> dict[str, Any]:
    """The JSON schema of an object with these fields, in this order; KeyError for an unknown field."""
    properties: dict[str, Any] = {}
    for field in fields:
        kind = "" if field in _NESTED else FIELDS[field][0]
        if field in _NESTED:
            properties[field] = schema(_NESTED[field])
        elif kind in _LISTS:
            properties[field] = {"type": "array", "items": {"type": "string"}}
        elif " " in kind:
            properties[field] = {"type": "string", "enum": kind.split()}
        else:
            properties[field] = {"type": "integer" if kind in _INTEGERS else "boolean" if kind == "bool" else "string"}
    return {"type": "object", "properties": properties}


def _listed(fields: tuple[str, ...]) -> str:
    """The fields in words: ``name (string), nights (integer), contact {phone (string), email (string)}``."""
    parts = []
    for field in fields:
        if field in _NESTED:
            parts.append(f"{field} {{{_listed(_NESTED[field])}}}")
            continue
        kind = FIELDS[field][0]
        if kind in _LISTS:
            name = "list of strings"
        elif " " in kind:
            name = " | ".join(kind.split())
        else:
            name = "integer" if kind in _INTEGERS else "boolean" if kind == "bool" else "string"
        parts.append(f"{field} ({name})")
    return ", ".join(parts)


def _value(kind: str, source: Source, split: Split, language: Language) -> Any:
    """A value for the object; text values are written in the paper as they are here."""
    if kind == "few":
        return source.between(2, 9)
    if kind in _INTEGERS:
        return int(world.draw(kind, source, split))
    if kind == "bool":
        return source.chance(50)
    if " " in kind:
        return source.pick(kind.split())
    if kind == "date":
        return f"2026-{world.draw('date', source, split)}"
    if kind == "name":
        return f"{world.draw('first_name', source, split)} {world.draw('last_name', source, split)}"
    if kind == "email":
        first, last = world.draw("first_name", source, split), world.draw("last_name", source, split)
        return f"{first}.{last}@{world.draw('mail_host', source, split)}".lower()
    if kind == "dishes":
        keys = source.sample(world.keys("dish", split), source.between(2, 3))
        return [world.word("dish", key, language) for key in keys]
    if kind == "languages":
        return source.sample(_SPOKEN[LANGUAGES.index(language)].split("|"), source.between(2, 3))
    table = {"day": "weekday"}.get(kind, kind)
    if table in world.TABLES:
        return world.draw_noun(table, source, split, language).text
    return world.draw(kind, source, split)


def _said(field: str, value: Any, language: Language) -> tuple[str, str, str]:
    """Label, short value and sentence of a field in the words of the paper."""
    at = LANGUAGES.index(language)
    kind, phrases = FIELDS[field]
    label, *sentences = phrases[at].split("|")
    if kind == "bool":
        return label, _YES[at].split("|")[not value], sentences[not value]
    if " " in kind:
        sentence = sentences[kind.split().index(value)]
        short = sentence[:-1].lower() if language != "de" else sentence[:-1]
        return label, short, sentence
    text = ", ".join(value) if isinstance(value, list) else str(value)
    unit = f" {world.CURRENCY[language]}" if kind == "price" else ""
    return label, text + unit, sentences[0].format(text)


def _paper(title: str, said: list[tuple[str, str, str]], source: Source, language: Language) -> str:
    """The text in one of eight layouts: labels in lines, bullets, one line or a receipt; prose, note, mail, letter."""
    at = LANGUAGES.index(language)
    prose = " ".join(sentence for _, _, sentence in said)
    opening, closing = source.pick(_OPENINGS[at].split("|")), source.pick(_CLOSINGS[at].split("|"))
    labelled = [f"{label}: {short}" for label, short, _ in said]
    match source.below(8):
        case 0:
            return "\n".join([title, *labelled])
        case 1:
            return "\n".join([title, *(f"- {line}" for line in labelled)])
        case 2:
            return f"{title}: " + "; ".join(labelled)
        case 3:
            return "\n".join([f"*** {title} ***", *(f"{label} .... {short}" for label, short, _ in said)])
        case 4:
            return f"{title}. {prose}"
        case 5:
            return "\n".join([opening, *labelled, closing])
        case 6:
            return f"{opening}\n{prose}\n{closing}"
        case _:
            return f"{title}\n{opening} {prose} {closing}."


def _chosen(source: Source, split: Split, suite: str) -> tuple[str, tuple[str, ...]]:
    """A paper and a schema of it: training schemas for ``records/values``, held-out ones for ``records/schemas``."""
    owner: Split = "train" if suite == "records/values" else split
    papers = [paper for paper in PAPERS if schemas(paper, owner)]
    paper = source.pick(papers)
    return paper, source.pick(schemas(paper, owner))


def records(seed: int, split: Split, number: int) -> Document:
    """Document ``number``: a paper and its fields in the user turn, the JSON object alone in the assistant turn.

    Held-out splits use their own names and numbers; suite ``records/schemas`` also sets of fields that training lacks.
    """
    source = Source("records", seed, split, number)
    language = LANGUAGES[0] if source.chance(60) else source.pick(LANGUAGES[1:])
    at = LANGUAGES.index(language)
    suite = "records/values" if split == "train" or source.chance(50) else "records/schemas"
    paper, chosen = _chosen(source, split, suite)
    titles, pool = PAPERS[paper]
    if source.chance(40):
        chosen = tuple(source.shuffled(chosen))
    asked = [leaf for field in chosen for leaf in _leaves(field)]
    others = [field for field in pool if field not in _NESTED and field not in asked]
    present = {*asked, *source.sample(others, min(len(others), source.below(3)))}
    order = list(dict.fromkeys(leaf for field in pool for leaf in _leaves(field) if leaf in present))
    if source.chance(40):
        order = source.shuffled(order)
    values = {leaf: _value(FIELDS[leaf][0], source, split, language) for leaf in order}
    text = _paper(titles[at], [_said(leaf, values[leaf], language) for leaf in order], source, language)
    record = {
        field: {leaf: values[leaf] for leaf in _NESTED[field]} if field in _NESTED else values[field]
        for field in chosen
    }
    task = source.pick(_TASKS[at].split("|"))
    if source.chance(50):
        wanted = f"{_FIELDS_WORD[at]}: {_listed(chosen)}"
    else:
        wanted = f"Schema: {json.dumps(schema(chosen), ensure_ascii=False)}"
    parts = [task, wanted, text] if source.chance(50) else [text, task, wanted]
    messages = (
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": json.dumps(record, ensure_ascii=False)},
    )
    return Document("records", suite, language, messages=messages, answer={"json": record, "schema": schema(chosen)})
