"""Function calls at the visitor desk: what a guest asks, 1-3 functions on offer, the call, its result, the answer.

A function is a verb and an object (``book_room``) with slots; a slot has a parameter name, a kind of value and a phrase
per language. So a held-out function (``cancel_room``) consists of parts that training has seen.
"""

from __future__ import annotations

import json
from string import ascii_letters, digits
from typing import Any, NamedTuple

from mixtral.desk import world
from mixtral.desk.source import Document, Source, Split
from mixtral.desk.world import LANGUAGES, Language

__all__ = ["FUNCTIONS", "HELD_OUT", "calls", "definition", "functions_of"]

_ALPHABET = ascii_letters + digits
_SPOKEN = ("English", "French", "German", "Spanish", "Italian")
_CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY", "SEK", "NOK", "CZK", "PLN", "DKK")

# verb -> description of its functions, "{}" is the object
_DESCRIPTIONS = {
    "book": "Book a {}", "cancel": "Cancel the booking of a {}", "change": "Change the booking of a {}",
    "price": "Get the price of a {}", "find": "Find a {}", "hours": "Get the opening hours of a {}",
    "weather": "Get the weather of a day", "lost": "Report a lost item", "fault": "Report something broken in a room",
    "convert": "Convert an amount of money", "alarm": "Set an alarm in a room", "order": "Order a dish to a room",
    "translate": "Translate a word",
}  # fmt: skip

# name: slots ("?" is optional); the name holds verb and object
_FUNCTION_TEXT = """
    book_room: name date nights breakfast?; book_table: restaurant guests time seat?; book_taxi: street time guests?
    book_tour: guests day spoken; book_bike: days date; book_boat: hours date
    cancel_room: name date; cancel_table: restaurant name; cancel_taxi: name time
    cancel_tour: date name; cancel_bike: name date; cancel_boat: code
    change_room: name new_date; change_table: name new_time; change_taxi: code new_time
    change_tour: code new_date; change_bike: code new_date; change_boat: name new_time
    get_room_price: nights guests; get_tour_price: guests spoken?; get_bike_price: days
    get_boat_price: hours guests?; get_train_price: city travel_class; get_bus_price: city day
    find_room: nights max_price breakfast?; find_train: city day travel_class?; find_bus: city time
    find_restaurant: near seat? max_price; find_museum: near day; find_shop: near day?
    get_museum_hours: museum day; get_restaurant_hours: its_name day; get_shop_hours: at_street day
    get_weather: in_city day; report_lost_item: item near day?; report_fault: device in_room
    convert_currency: amount to_currency; set_alarm: in_room time; order_food: quantity dish in_room
    translate_word: quoted spoken
"""
_ODD_NAMES = {"get_weather": ("weather", ""), "report_lost_item": ("lost", ""), "report_fault": ("fault", ""),
              "convert_currency": ("convert", ""), "set_alarm": ("alarm", ""), "order_food": ("order", ""),
              "translate_word": ("translate", "")}  # fmt: skip
HELD_OUT: dict[str, Split] = {
    **dict.fromkeys(("cancel_room", "book_boat", "change_tour", "get_bike_price", "find_bus", "get_shop_hours"),
                    "validation"),
    **dict.fromkeys(("cancel_bike", "book_tour", "change_table", "get_train_price", "find_museum", "get_room_price"),
                    "test"),
}  # fmt: skip
"""Functions that never occur in training documents, with the split that owns them."""

# slot -> (parameter, kind, phrases en fr de es it). Phrases of bool and enum kinds: one per value, split by "|".
_SLOTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "name": ("name", "name",
             ("in the name of {}", "au nom de {}", "auf den Namen {}", "a nombre de {}", "a nome di {}")),
    "date": ("date", "date", ("on {}", "le {}", "am {}", "el {}", "il {}")),
    "new_date": ("new_date", "date", ("to {}", "au {}", "auf den {}", "al {}", "al {}")),
    "time": ("time", "time", ("at {}", "à {}", "um {} Uhr", "a las {}", "alle {}")),
    "new_time": ("new_time", "time", ("to {}", "à {}", "auf {} Uhr", "a las {}", "alle {}")),
    "day": ("day", "day", ("on {}", "{}", "am {}", "el {}", "{}")),
    "nights": ("nights", "few", ("for {} nights", "pour {} nuits", "für {} Nächte", "para {} noches", "per {} notti")),
    "days": ("days", "few", ("for {} days", "pour {} jours", "für {} Tage", "para {} días", "per {} giorni")),
    "hours": ("hours", "few", ("for {} hours", "pour {} heures", "für {} Stunden", "para {} horas", "per {} ore")),
    "guests": ("guests", "few",
               ("for {} people", "pour {} personnes", "für {} Personen", "para {} personas", "per {} persone")),
    "breakfast": ("breakfast", "bool",
                  ("with breakfast|without breakfast", "avec petit déjeuner|sans petit déjeuner",
                   "mit Frühstück|ohne Frühstück", "con desayuno|sin desayuno", "con colazione|senza colazione")),
    "seat": ("seat", "enum inside outside",
             ("inside|outside", "à l'intérieur|en terrasse", "drinnen|draußen", "dentro|fuera", "dentro|fuori")),
    "travel_class": ("class", "enum first second",
      ("in first class|in second class", "en première classe|en deuxième classe", "in erster Klasse|in zweiter Klasse",
       "en primera clase|en segunda clase", "in prima classe|in seconda classe")),
    "spoken": ("language", "enum " + " ".join(_SPOKEN),
               ("in English|in French|in German|in Spanish|in Italian",
                "en anglais|en français|en allemand|en espagnol|en italien",
                "auf Englisch|auf Französisch|auf Deutsch|auf Spanisch|auf Italienisch",
                "en inglés|en francés|en alemán|en español|en italiano",
                "in inglese|in francese|in tedesco|in spagnolo|in italiano")),
    "restaurant": ("restaurant", "restaurant", ("at the restaurant {}", "au restaurant {}", "im Restaurant {}",
                                                "en el restaurante {}", "al ristorante {}")),
    "its_name": ("restaurant", "restaurant", ("{}",) * 5),
    "street": ("street", "street", ("to {}", "pour {}", "zur {}", "a {}", "per {}")),
    "at_street": ("street", "street", ("in {}", "dans {}", "in der {}", "en {}", "in {}")),
    "near": ("near", "street", ("near {}", "près de {}", "in der Nähe der {}", "cerca de {}", "vicino a {}")),
    "city": ("city", "city", ("to {}", "pour {}", "nach {}", "a {}", "per {}")),
    "in_city": ("city", "city", ("in {}", "à {}", "in {}", "en {}", "a {}")),
    "code": ("code", "code", ("with the code {}", "avec le code {}", "mit dem Code {}", "con el código {}",
                              "con il codice {}")),
    "max_price": ("max_price", "price", ("for at most {} euros", "pour {} euros au plus", "für höchstens {} Euro",
                                         "por {} euros como máximo", "per {} euro al massimo")),
    "in_room": ("room", "room",
                ("in room {}", "dans la chambre {}", "in Zimmer {}", "en la habitación {}", "nella camera {}")),
    **{kind: (kind, kind, ("{}",) * 5) for kind in ("museum", "item", "device", "dish")},
    "quantity": ("quantity", "count", ("{} x",) * 5), "quoted": ("word", "word", ('"{}"',) * 5),
    "amount": ("amount", "price", ("{} EUR",) * 5),
    "to_currency": ("currency", "currency", ("into {}", "en {}", "in {}", "en {}", "in {}")),
}  # fmt: skip
_OPEN = {"name", "date", "time", "restaurant", "street", "city", "code", "price", "room", "item", "word"}
_TYPES = {"few": "integer", "count": "integer", "price": "integer", "room": "integer", "bool": "boolean"}

# object -> en; fr; de; es; it, each "indefinite article|my or the" and the noun (German: accusative)
_OBJECTS: dict[str, tuple[str, ...]] = {
    row.split(";")[0].split()[1]: tuple(row.split("; "))
    for row in (
        "a|my room; une|ma chambre; ein|mein Zimmer; una|mi habitación; una|la mia camera",
        "a|my table; une|ma table; einen|meinen Tisch; una|mi mesa; un|il mio tavolo",
        "a|my taxi; un|mon taxi; ein|mein Taxi; un|mi taxi; un|il mio taxi",
        "a|my tour; une|ma visite; eine|meine Führung; una|mi visita; una|la mia visita",
        "a|my bike; un|mon vélo; ein|mein Fahrrad; una|mi bicicleta; una|la mia bicicletta",
        "a|my boat; un|mon bateau; ein|mein Boot; un|mi barco; una|la mia barca",
        "a|my train; un|mon train; eine|meine Zugfahrt; un|mi tren; un|il mio treno",
        "a|my bus; un|mon bus; eine|meine Busfahrt; un|mi autobús; un|il mio autobus",
        "a|the restaurant; un|le restaurant; ein|das Restaurant; un|el restaurante; un|il ristorante",
        "a|the museum; un|le musée; ein|das Museum; un|el museo; un|il museo",
        "a|the shop; un|le magasin; ein|das Geschäft; una|la tienda; un|il negozio",
    )
}
_DEVICES = (
    "the lamp|the shower|the heating|the window|the door|the fridge|the radio|the bed",
    "la lampe|la douche|le chauffage|la fenêtre|la porte|le frigo|la radio|le lit",
    "die Lampe|die Dusche|die Heizung|das Fenster|die Tür|der Kühlschrank|das Radio|das Bett",
    "la lámpara|la ducha|la calefacción|la ventana|la puerta|la nevera|la radio|la cama",
    "la lampada|la doccia|il riscaldamento|la finestra|la porta|il frigorifero|la radio|il letto",
)
_FEW = [row.split() for row in (
    "two three four five six seven eight nine", "deux trois quatre cinq six sept huit neuf",
    "zwei drei vier fünf sechs sieben acht neun", "dos tres cuatro cinco seis siete ocho nueve",
    "due tre quattro cinque sei sette otto nove",
)]  # fmt: skip
# polite frames around an infinitive
_FRAMES = (
    "Please {}.|Can you {}?|Could you {}, please?|I would like to {}.|I want to {}.|I need to {}.",
    "Pouvez-vous {} ?|Pourriez-vous {} ?|Je voudrais {}.|J'aimerais {}.|Je veux {}.|Je dois {}.",
    "Können Sie bitte {}?|Könnten Sie {}?|Ich möchte {}.|Ich würde gern {}.|Ich will {}.|Ich muss {}.",
    "¿Puede {}?|Por favor, ¿podría {}?|Quisiera {}.|Me gustaría {}.|Quiero {}.|Necesito {}.",
    "Può {}?|Potrebbe {}, per favore?|Vorrei {}.|Mi piacerebbe {}.|Voglio {}.|Devo {}.",
)
# verb -> per language "infinitive|infinitive|Direct question?"; {} is object and slots
_VERBS: dict[str, tuple[str, ...]] = {
    "book": ("book {}|reserve {}", "réserver {}|retenir {}", "{} buchen|{} reservieren", "reservar {}|pedir {}",
             "prenotare {}|riservare {}"),
    "cancel": ("cancel {}|give up {}", "annuler {}|décommander {}", "{} absagen|{} stornieren",
               "cancelar {}|anular {}", "annullare {}|disdire {}"),
    "change": ("change {}|move {}", "changer {}|déplacer {}", "{} ändern|{} verlegen", "cambiar {}|mover {}",
               "cambiare {}|spostare {}"),
    "price": ("check the price of {}|How much is {}?|What does {} cost?",
              "vérifier le prix pour {}|Combien coûte {} ?|Quel est le prix pour {} ?",
              "den Preis für {} nachsehen|Was kostet {}?|Wie viel kostet {}?",
              "ver el precio de {}|¿Cuánto cuesta {}?|¿Qué precio tiene {}?",
              "vedere il prezzo di {}|Quanto costa {}?|Qual è il prezzo di {}?"),
    "find": ("find {}|look for {}|Is there {}?", "trouver {}|chercher {}|Y a-t-il {} ?",
             "{} finden|{} suchen|Gibt es {}?", "encontrar {}|buscar {}|¿Hay {}?", "trovare {}|cercare {}|C'è {}?"),
    "hours": ("check the opening hours for {}|When does {} open?|What are the opening hours for {}?",
              "vérifier les horaires pour {}|Quand ouvre {} ?|Quels sont les horaires pour {} ?",
              "die Öffnungszeiten für {} nachsehen|Wann öffnet {}?|Wann hat {} geöffnet?",
              "ver el horario para {}|¿Cuándo abre {}?|¿Qué horario tiene {}?",
              "vedere gli orari per {}|Quando apre {}?|Che orari ha {}?"),
    "weather": ("check the weather {}|What is the weather like {}?|How will the weather be {}?",
                "vérifier la météo {}|Quel temps fera-t-il {} ?|Quelle est la météo {} ?",
                "das Wetter {} nachsehen|Wie wird das Wetter {}?|Wie ist das Wetter {}?",
                "ver el tiempo {}|¿Qué tiempo hará {}?|¿Cómo estará el tiempo {}?",
                "vedere il meteo {}|Che tempo farà {}?|Come sarà il tempo {}?"),
    "lost": ("report that I lost {}|I lost {}.|I have lost {}.", "signaler que j'ai perdu {}|J'ai perdu {}.",
             "melden, dass ich {} verloren habe|Ich habe {} verloren.", "avisar de que he perdido {}|He perdido {}.",
             "segnalare che ho perso {}|Ho perso {}."),
    "fault": ("report a problem with {}|There is a problem with {}.|{} does not work.",
              "signaler une panne : {}|{} ne marche pas.|{} ne fonctionne pas.",
              "ein Problem melden: {}|{} funktioniert nicht.|{} ist kaputt.",
              "avisar de un problema con {}|{} no funciona.|Hay un problema con {}.",
              "segnalare un problema con {}|{} non funziona.|C'è un problema con {}."),
    "convert": ("convert {}|change {}|exchange {}", "convertir {}|changer {}|Combien font {} ?",
                "{} umrechnen|{} wechseln|Wie viel sind {}?", "convertir {}|cambiar {}|¿Cuánto son {}?",
                "convertire {}|cambiare {}|Quanto sono {}?"),
    "alarm": ("set an alarm {}|put an alarm {}", "mettre un réveil {}|régler un réveil {}",
              "einen Wecker {} stellen|einen Wecker {} einstellen", "poner una alarma {}|poner un despertador {}",
              "mettere una sveglia {}|impostare una sveglia {}"),
    "order": ("order {}|get {}", "commander {}|demander {}", "{} bestellen|{} ordern", "pedir {}|encargar {}",
              "ordinare {}|chiedere {}"),
    "translate": ("say {}|What is {}?|How do you say {}?", "traduire {}|dire {}|Comment dit-on {} ?",
                  "{} übersetzen|{} sagen|Was heißt {}?", "traducir {}|decir {}|¿Cómo se dice {}?",
                  "tradurre {}|dire {}|Come si dice {}?"),
}  # fmt: skip
# outcome -> (keys of the result, answers en fr de es it)
_OUTCOMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "book": ("status=booked code", ("It is booked. The code is {code}.", "C'est réservé. Le code est {code}.",
             "Es ist gebucht. Der Code ist {code}.", "Está reservado. El código es {code}.",
             "È prenotato. Il codice è {code}.")),
    "full": ("status=full next_date", ("I am sorry, there is nothing free. The next date is {next_date}.",
             "Je suis désolé, il n'y a plus rien. La prochaine date est le {next_date}.",
             "Es tut mir leid, es ist nichts frei. Der nächste Termin ist am {next_date}.",
             "Lo siento, no queda nada libre. La próxima fecha es el {next_date}.",
             "Mi dispiace, non c'è posto. La prossima data è il {next_date}.")),
    "cancel": ("status=cancelled refund", ("It is cancelled. You get {refund} euros back.",
               "C'est annulé. On vous rend {refund} euros.", "Es ist abgesagt. Sie bekommen {refund} Euro zurück.",
               "Está cancelado. Le devolvemos {refund} euros.", "È annullato. Le restituiamo {refund} euro.")),
    "change": ("status=changed code", ("It is changed. The new code is {code}.",
               "C'est changé. Le nouveau code est {code}.", "Es ist geändert. Der neue Code ist {code}.",
               "Está cambiado. El nuevo código es {code}.", "È cambiato. Il nuovo codice è {code}.")),
    "price": ("price", ("The price is {price} euros.", "Le prix est de {price} euros.", "Der Preis ist {price} Euro.",
              "El precio es de {price} euros.", "Il prezzo è di {price} euro.")),
    "find": ("street price", ("Yes, in {street}, for {price} euros.", "Oui, dans {street}, pour {price} euros.",
             "Ja, in der {street}, für {price} Euro.", "Sí, en {street}, por {price} euros.",
             "Sì, in {street}, per {price} euro.")),
    "leave": ("departure price", ("Yes, it leaves at {departure} and costs {price} euros.",
              "Oui, le départ est à {departure} et coûte {price} euros.",
              "Ja, die Abfahrt ist um {departure} Uhr und kostet {price} Euro.",
              "Sí, sale a las {departure} y cuesta {price} euros.",
              "Sì, parte alle {departure} e costa {price} euro.")),
    "hours": ("open close", ("It is open from {open} to {close}.", "C'est ouvert de {open} à {close}.",
              "Es ist von {open} bis {close} Uhr geöffnet.", "Está abierto de {open} a {close}.",
              "È aperto dalle {open} alle {close}.")),
    "weather": ("degrees", ("It will be {degrees} degrees.", "Il fera {degrees} degrés.", "Es werden {degrees} Grad.",
                "Habrá {degrees} grados.", "Ci saranno {degrees} gradi.")),
    "lost": ("found=true room", ("We have found it. It is in room {room}.",
             "On l'a trouvé. C'est dans la chambre {room}.", "Es wurde gefunden. Es ist in Zimmer {room}.",
             "Lo hemos encontrado. Está en la habitación {room}.", "È stato trovato. È nella camera {room}.")),
    "fault": ("minutes", ("Somebody will come in {minutes} minutes.", "Quelqu'un viendra dans {minutes} minutes.",
              "In {minutes} Minuten kommt jemand.", "Alguien vendrá en {minutes} minutos.",
              "Qualcuno verrà tra {minutes} minuti.")),
    "convert": ("result", ("That is {result} {currency}.", "Cela fait {result} {currency}.",
                "Das sind {result} {currency}.", "Son {result} {currency}.", "Sono {result} {currency}.")),
    "alarm": ("status=set", ("The alarm is set for {time}.", "Le réveil est mis à {time}.",
              "Der Wecker ist auf {time} Uhr gestellt.", "La alarma está puesta a las {time}.",
              "La sveglia è impostata alle {time}.")),
    "order": ("minutes price", ("It will be there in {minutes} minutes and costs {price} euros.",
              "Ce sera là dans {minutes} minutes et coûte {price} euros.",
              "Es kommt in {minutes} Minuten und kostet {price} Euro.",
              "Llegará en {minutes} minutos y cuesta {price} euros.",
              "Arriva tra {minutes} minuti e costa {price} euro.")),
    "translate": ("translation", ('The word is "{translation}".', 'Le mot est « {translation} ».',
                  'Das Wort ist "{translation}".', 'La palabra es "{translation}".', 'La parola è "{translation}".')),
}  # fmt: skip
_REFUSALS = (
    "I am sorry, I cannot do that.|I am sorry, I have no function for that.",
    "Je suis désolé, je ne peux pas faire cela.|Je suis désolé, je n'ai pas de fonction pour cela.",
    "Es tut mir leid, das kann ich nicht tun.|Es tut mir leid, dafür habe ich keine Funktion.",
    "Lo siento, no puedo hacer eso.|Lo siento, no tengo ninguna función para eso.",
    "Mi dispiace, non posso farlo.|Mi dispiace, non ho una funzione per questo.",
)
# "said>reply" per language; occurs in training documents only, because it holds no values
_SMALL_TALK = (
    "Hello!>Hello! How can I help you?|Thank you!>You are welcome.|Many thanks.>You are welcome.|Goodbye!>Goodbye!",
    "Bonjour !>Bonjour ! Comment puis-je vous aider ?|Merci !>De rien.|Merci beaucoup.>De rien.|Au revoir.>Au revoir !",
    "Hallo!>Hallo! Wie kann ich helfen?|Danke!>Gern geschehen.|Vielen Dank.>Gern geschehen.|Guten Tag!>Guten Tag!",
    "¡Hola!>¡Hola! ¿En qué puedo ayudarle?|¡Gracias!>De nada.|Muchas gracias.>De nada.|¡Adiós!>¡Adiós!",
    "Salve!>Salve! Come posso aiutarla?|Grazie!>Prego.|Molte grazie.>Prego.|Arrivederci!>Arrivederci!",
)


class _Function(NamedTuple):
    verb: str
    thing: str
    slots: tuple[str, ...]
    optional: frozenset[str]


class _Call(NamedTuple):
    said: str
    name: str
    arguments: dict[str, Any]
    parameters: tuple[str, ...]


def _parse_functions() -> dict[str, _Function]:
    functions = {}
    for entry in _FUNCTION_TEXT.strip().replace("\n", ";").split(";"):
        name, slots = (part.strip() for part in entry.split(":"))
        first, *_, last = name.split("_")
        verb, thing = _ODD_NAMES.get(name) or ((last, name.split("_")[1]) if first == "get" else (first, last))
        optional = frozenset(slot[:-1] for slot in slots.split() if slot.endswith("?"))
        functions[name] = _Function(verb, thing, tuple(slots.replace("?", "").split()), optional)
    return functions


FUNCTIONS = _parse_functions()
"""All 40 functions by name."""


def functions_of(split: Split, *, unseen: bool = False) -> tuple[str, ...]:
    """Names of the functions trained on, or with ``unseen`` those held out for ``split`` (none for train)."""
    return tuple(name for name in FUNCTIONS if (HELD_OUT.get(name) == split if unseen else name not in HELD_OUT))


def _askable(split: Split) -> tuple[str, ...]:
    """Trained functions to ask for; held-out splits only take those with a value that training cannot have seen."""
    seen = functions_of(split)
    return tuple(
        name for name in seen if split == "train" or {_SLOTS[slot][1] for slot in FUNCTIONS[name].slots} & _OPEN
    )


def definition(name: str, order: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The OpenAI tool definition of a function, its slots in ``order``; KeyError for an unknown name."""
    function = FUNCTIONS[name]
    slots = order or function.slots
    properties: dict[str, Any] = {}
    for slot in slots:
        parameter, kind, _ = _SLOTS[slot]
        properties[parameter] = {"type": _TYPES.get(kind, "string")}
        if kind.startswith("enum"):
            properties[parameter]["enum"] = kind.split()[1:]
    required = [_SLOTS[slot][0] for slot in slots if slot not in function.optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    description = _DESCRIPTIONS[function.verb].format(function.thing)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _value(slot: str, source: Source, split: Split, language: Language, *, target: bool) -> tuple[Any, str]:
    """A value for the arguments and its phrase in the user's words; ``target``: a language other than the user's."""
    _, kind, phrases = _SLOTS[slot]
    at = LANGUAGES.index(language)
    phrase = phrases[at]
    if kind in {"few", "count"}:
        number = source.between(2, 9)
        return number, phrase.format(_FEW[at][number - 2] if kind == "few" and source.chance(25) else number)
    if kind == "bool" or kind.startswith("enum"):
        values = [True, False] if kind == "bool" else kind.split()[1:]
        place = source.below(len(values))
        if target and place == at:  # nobody translates into the language of the word
            place = (place + 1) % len(values)
        return values[place], phrase.split("|")[place]
    if kind in {"price", "room"}:
        text = world.draw(kind, source, split)
        return int(text), phrase.format(text)
    said = ""
    if kind == "name":
        text = f"{world.draw('first_name', source, split)} {world.draw('last_name', source, split)}"
    elif kind == "date":
        text = f"2026-{world.draw('date', source, split)}"
    elif kind == "day":
        text = world.word("weekday", world.draw_key("weekday", source, split), language)
    elif kind == "currency":
        text = source.pick(_CURRENCIES[1:])
    elif kind == "dish":
        text = world.word("dish", world.draw_key("dish", source, split), language)
    elif kind == "device":
        said = source.pick(_DEVICES[at].split("|"))
        text = said.partition(" ")[2]
    elif kind in {"item", "word"}:
        key = world.draw_key("item", source, split)
        text = world.word("item", key, language)
        said = world.forms("item", key, language)["my"] if kind == "item" else text
    elif kind == "museum":
        key = source.pick(("maritime_museum", "clock_museum", "glass_museum"))
        text, said = world.word("place", key, language), world.forms("place", key, language)["the"]
    else:
        text = world.draw(kind, source, split)
    return text, phrase.format(said or text)


def _call(name: str, source: Source, split: Split, language: Language) -> _Call:
    function, at = FUNCTIONS[name], LANGUAGES.index(language)
    chosen = [slot for slot in function.slots if slot not in function.optional or source.chance(50)]
    target = function.verb == "translate"
    drawn = {slot: _value(slot, source, split, language, target=target) for slot in chosen}
    fixed = function.thing not in _OBJECTS or function.verb in {"hours", "price"}
    spoken = chosen if fixed or source.chance(60) else source.shuffled(chosen)
    words = [drawn[slot][1] for slot in spoken]
    if function.thing in _OBJECTS and "museum" not in function.slots:
        articles, noun = _OBJECTS[function.thing][at].rsplit(" ", 1)
        words.insert(0, f"{articles.split('|')[function.verb in {'cancel', 'change', 'hours'}]} {noun}")
    pattern = source.pick(_VERBS[function.verb][at].split("|"))
    said = pattern.format(" ".join(words))
    if pattern[-1] in ".?!":
        said = said[0].upper() + said[1:]
    else:
        said = source.pick(_FRAMES[at].split("|")).format(said)
    order = tuple(source.shuffled(function.slots)) if source.chance(30) else function.slots
    arguments = {_SLOTS[slot][0]: drawn[slot][0] for slot in order if slot in drawn}
    return _Call(said, name, arguments, order)


def _offer(wanted: list[_Call], source: Source, split: Split, *, total: int, like: str = "") -> list[dict[str, Any]]:
    """The wanted functions and others, ``total`` or more, shuffled; half the time the others resemble ``like``."""
    offered = {call.name: definition(call.name, call.parameters) for call in wanted}
    pool = functions_of(split) + functions_of(split, unseen=True)
    names = [name for name in source.shuffled(pool) if name not in {like, *offered}]
    if like and source.chance(50):
        verb, thing, _, _ = FUNCTIONS[like]
        names.sort(key=lambda name: not (FUNCTIONS[name].verb == verb or FUNCTIONS[name].thing == thing != ""))
    offered |= {name: definition(name) for name in names[: max(0, total - len(offered))]}
    return source.shuffled(list(offered.values()))


def _tool_call(call: _Call, call_id: str = "") -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": function}


def _result(
    call: _Call, source: Source, split: Split, language: Language
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The function's result, the answer in the user's language, and what a checker looks for."""
    function = FUNCTIONS[call.name]
    outcome = function.verb
    if outcome in {"book", "change"} and source.chance(25):
        outcome = "full"
    elif outcome == "find" and function.thing in {"train", "bus"}:
        outcome = "leave"
    keys, answers = _OUTCOMES[outcome]
    result: dict[str, Any] = {}
    for key in keys.split():
        name, _, constant = key.partition("=")
        if constant:
            result[name] = constant == "true" or constant
        elif name in {"price", "refund", "room", "result"}:
            most = call.arguments.get("max_price", 9999)
            values = [int(item) for item in world.items("room" if name == "room" else "price", split)]
            result[name] = source.pick([value for value in values if value <= most])
        elif name in {"minutes", "degrees"}:
            result[name] = source.between(5, 45)
        elif name == "next_date":
            asked = call.arguments.get("date") or call.arguments.get("new_date") or ""
            dates = [f"2026-{item}" for item in world.items("date", split)]
            result[name] = source.pick([date for date in dates if date > asked] or dates)
        elif name == "translation":
            table, target = world.TABLES["item"], LANGUAGES[_SPOKEN.index(call.arguments["language"])]
            key = next(key for key, row in table.items() if row[language].text == call.arguments["word"])
            result[name] = table[key][target].text
        elif name in {"open", "close"}:
            times = world.items("time", split)
            result[name] = source.pick(times[: len(times) // 3] if name == "open" else times[-len(times) // 3 :])
        else:
            result[name] = world.draw("time" if name == "departure" else name, source, split)
    for name in {"convert": ["currency"], "alarm": ["time"]}.get(outcome, []):
        result[name] = call.arguments[name]
    answer = answers[LANGUAGES.index(language)].format(**result)
    constants = {key.split("=")[0] for key in keys.split() if "=" in key}
    return result, answer, {"contains": [str(value) for name, value in result.items() if name not in constants]}


def _ask(source: Source, split: Split, language: Language, *, unseen: bool) -> Document:
    """One call, or in one of eight documents two parallel calls."""
    pool = functions_of(split, unseen=True) if unseen else _askable(split)
    made = [_call(source.pick(pool), source, split, language)]
    if source.chance(18):
        names = [name for name in _askable(split) if name != made[0].name]
        made.append(_call(source.pick(names), source, split, language))
    tools = _offer(made, source, split, total=source.between(1, 3), like=made[0].name)
    answer = [{"name": call.name, "arguments": call.arguments} for call in made]
    messages = (
        {"role": "user", "content": " ".join(call.said for call in made)},
        {"role": "assistant", "tool_calls": [_tool_call(call) for call in made]},
    )
    suite = "calls/unseen" if unseen else "calls/values"
    return Document("calls", suite, language, messages=messages, tools=tuple(tools), answer={"calls": answer})


def _none(source: Source, split: Split, language: Language) -> Document:
    """No function on offer fits: a short reply instead of a call."""
    at = LANGUAGES.index(language)
    if split == "train" and source.chance(35):
        said, reply = source.pick(_SMALL_TALK[at].split("|")).split(">")
        tools = _offer([], source, split, total=source.between(1, 3))
    else:
        call = _call(source.pick(_askable(split)), source, split, language)
        said, reply = call.said, source.pick(_REFUSALS[at].split("|"))
        tools = _offer([], source, split, total=source.between(1, 3), like=call.name)
    messages = ({"role": "user", "content": said}, {"role": "assistant", "content": reply})
    return Document("calls", "calls/none", language, messages=messages, tools=tuple(tools), answer={"calls": []})


def _answer(source: Source, split: Split, language: Language) -> Document:
    """A call that was made and its result: the assistant says it to the guest."""
    call = _call(source.pick(_askable(split)), source, split, language)
    call_id = "".join(source.pick(_ALPHABET) for _ in range(9))
    result, answer, known = _result(call, source, split, language)
    content = json.dumps(result, ensure_ascii=False)
    messages = (
        {"role": "user", "content": call.said},
        {"role": "assistant", "tool_calls": [_tool_call(call, call_id)], "weight": 0},
        {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": content},
        {"role": "assistant", "content": answer},
    )
    tools = _offer([call], source, split, total=source.between(1, 2), like=call.name)
    return Document("calls", "calls/answer", language, messages=messages, tools=tuple(tools), answer=known)


def calls(seed: int, split: Split, number: int) -> Document:
    """Document ``number``: a request, 1-3 functions, and the right call, reply or answer.

    Held-out splits use their own names, dates, times, numbers and codes; suite ``calls/unseen`` their own functions.
    """
    source = Source("calls", seed, split, number)
    language = LANGUAGES[0] if source.chance(60) else source.pick(LANGUAGES[1:])
    place = source.below(100)
    if place < 15:
        return _none(source, split, language)
    if place < (45 if split == "train" else 35):
        return _answer(source, split, language)
    return _ask(source, split, language, unseen=split != "train" and place >= 68)
