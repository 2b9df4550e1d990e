"""Words of the town in five languages: their gender, their articles, and how dates and prices are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from mixtral.desk.source import Source, Split, split_of

__all__ = [
    "CURRENCY",
    "LANGUAGES",
    "SPLIT_TABLES",
    "TABLES",
    "Language",
    "Noun",
    "date",
    "draw_key",
    "forms",
    "forms_of",
    "keys",
    "price",
    "weekday",
    "word",
]

Language = Literal["en", "fr", "de", "es", "it"]
LANGUAGES: tuple[Language, ...] = ("en", "fr", "de", "es", "it")
CURRENCY: Mapping[Language, str] = MappingProxyType(
    {"en": "euros", "fr": "euros", "de": "Euro", "es": "euros", "it": "euro"}
)

# --- tables: words in five languages, "english; french g; german g; spanish g; italian g" ----------------------------

_TABLE_TEXT: dict[str, str] = {
    "item": """
        umbrella; parapluie m; Regenschirm m; paraguas m; ombrello m
        wallet; portefeuille m; Geldbörse f; cartera f; portafoglio m
        scarf; écharpe f; Schal m; bufanda f; sciarpa f
        camera; appareil photo m; Kamera f; cámara f; macchina fotografica f
        phone; téléphone m; Handy n; teléfono m; telefono m
        key; clé f; Schlüssel m; llave f; chiave f
        hat; chapeau m; Hut m; sombrero m; cappello m
        watch; montre f; Uhr f; reloj m; orologio m
        ring; bague f; Ring m; anillo m; anello m
        backpack; sac à dos m; Rucksack m; mochila f; zaino m
        suitcase; valise f; Koffer m; maleta f; valigia f
        book; livre m; Buch n; libro m; libro m
        passport; passeport m; Reisepass m; pasaporte m; passaporto m
        jacket; veste f; Jacke f; chaqueta f; giacca f
        coat; manteau m; Mantel m; abrigo m; cappotto m
        bracelet; bracelet m; Armband n; pulsera f; braccialetto m
        necklace; collier m; Halskette f; collar m; collana f
        tablet; tablette f; Tablet n; tableta f; tablet m
        charger; chargeur m; Ladegerät n; cargador m; caricabatterie m
        notebook; carnet m; Notizbuch n; cuaderno m; quaderno m
        pen; stylo m; Füller m; bolígrafo m; penna f
        guitar; guitare f; Gitarre f; guitarra f; chitarra f
        doll; poupée f; Puppe f; muñeca f; bambola f
        ball; ballon m; Ball m; pelota f; palla f
        basket; panier m; Korb m; cesta f; cesto m
        bottle; bouteille f; Flasche f; botella f; bottiglia f
        map; carte f; Landkarte f; mapa m; mappa f
        bag; sac m; Tasche f; bolso m; borsa f
        handbag; sac à main m; Handtasche f; bolso de mano m; borsetta f
        cap; casquette f; Mütze f; gorra f; berretto m
        glove; gant m; Handschuh m; guante m; guanto m
        sweater; pull m; Pullover m; jersey m; maglione m
        towel; serviette f; Handtuch n; toalla f; asciugamano m
        laptop; ordinateur m; Laptop m; ordenador m; portatile m
        shirt; chemise f; Hemd n; camisa f; camicia f
        belt; ceinture f; Gürtel m; cinturón m; cintura f
        violin; violon m; Geige f; violín m; violino m
        lamp; lampe f; Lampe f; lámpara f; lampada f
        toy; jouet m; Spielzeug n; juguete m; giocattolo m
        ticket; billet m; Fahrkarte f; billete m; biglietto m
    """,
    "room_type": """
        single room; chambre simple f; Einzelzimmer n; habitación individual f; camera singola f
        double room; chambre double f; Doppelzimmer n; habitación doble f; camera doppia f
        family room; chambre familiale f; Familienzimmer n; habitación familiar f; camera familiare f
        suite; suite f; Suite f; suite f; suite f
    """,
    "place": """
        Maritime Museum; Musée maritime m; Seefahrtsmuseum n; Museo Marítimo m; Museo marittimo m
        Clock Museum; Musée des horloges m; Uhrenmuseum n; Museo del Reloj m; Museo degli orologi m
        Glass Museum; Musée du verre m; Glasmuseum n; Museo del Vidrio m; Museo del vetro m
        Castle; Château m; Schloss n; Castillo m; Castello m
        Lighthouse; Phare m; Leuchtturm m; Faro m; Faro m
        Botanical Garden; Jardin botanique m; Botanische Garten m; Jardín Botánico m; Giardino botanico m
        Aquarium; Aquarium m; Aquarium n; Acuario m; Acquario m
        Town Library; Bibliothèque municipale f; Stadtbibliothek f; Biblioteca Municipal f; Biblioteca comunale f
        Market Hall; Marché couvert m; Markthalle f; Plaza de Abastos f; Sala del mercato f
        Puppet Theatre; Théâtre de marionnettes m; Puppentheater n; Teatro de Marionetas m; Teatro delle marionette m
        Old Mill; Vieux Moulin m; Alte Mühle f; Molino Viejo m; Vecchio mulino m
        Swimming Pool; Piscine f; Schwimmbad n; Piscina f; Piscina f
    """,
    "cuisine": """
        Italian; italienne; italienisch; italiana; italiana
        French; française; französisch; francesa; francese
        Spanish; espagnole; spanisch; española; spagnola
        Indian; indienne; indisch; india; indiana
        Japanese; japonaise; japanisch; japonesa; giapponese
        Greek; grecque; griechisch; griega; greca
        vegetarian; végétarienne; vegetarisch; vegetariana; vegetariana
        Mexican; mexicaine; mexikanisch; mexicana; messicana
    """,
    "weekday": """
        Monday; lundi; Montag; lunes; lunedì
        Tuesday; mardi; Dienstag; martes; martedì
        Wednesday; mercredi; Mittwoch; miércoles; mercoledì
        Thursday; jeudi; Donnerstag; jueves; giovedì
        Friday; vendredi; Freitag; viernes; venerdì
        Saturday; samedi; Samstag; sábado; sabato
        Sunday; dimanche; Sonntag; domingo; domenica
    """,
    "month": """
        January; janvier; Januar; enero; gennaio
        February; février; Februar; febrero; febbraio
        March; mars; März; marzo; marzo
        April; avril; April; abril; aprile
        May; mai; Mai; mayo; maggio
        June; juin; Juni; junio; giugno
        July; juillet; Juli; julio; luglio
        August; août; August; agosto; agosto
        September; septembre; September; septiembre; settembre
        October; octobre; Oktober; octubre; ottobre
        November; novembre; November; noviembre; novembre
        December; décembre; Dezember; diciembre; dicembre
    """,
    "weather": """
        it is sunny; il y a du soleil; es ist sonnig; hace sol; c'è il sole
        it is raining; il pleut; es regnet; está lloviendo; piove
        it is snowing; il neige; es schneit; está nevando; nevica
        it is windy; il y a du vent; es ist windig; hace viento; c'è vento
        it is cold; il fait froid; es ist kalt; hace frío; fa freddo
        it is hot; il fait chaud; es ist heiß; hace calor; fa caldo
        it is cloudy; le ciel est couvert; es ist bewölkt; está nublado; è nuvoloso
        it is foggy; il y a du brouillard; es ist neblig; hay niebla; c'è la nebbia
    """,
    "dish": """
        onion soup; soupe à l'oignon f; Zwiebelsuppe f; sopa de cebolla f; zuppa di cipolle f
        fish soup; soupe de poisson f; Fischsuppe f; sopa de pescado f; zuppa di pesce f
        potato salad; salade de pommes de terre f; Kartoffelsalat m; ensalada de patatas f; insalata di patate f
        mushroom risotto; risotto aux champignons m; Pilzrisotto n; risotto de setas m; risotto ai funghi m
        roast chicken; poulet rôti m; Brathähnchen n; pollo asado m; pollo arrosto m
        apple tart; tarte aux pommes f; Apfelkuchen m; tarta de manzana f; torta di mele f
        lemon ice cream; glace au citron f; Zitroneneis n; helado de limón m; gelato al limone m
        vegetable curry; curry de légumes m; Gemüsecurry n; curry de verduras m; curry di verdure m
        cheese plate; assiette de fromages f; Käseteller m; plato de quesos m; piatto di formaggi m
        tomato soup; soupe à la tomate f; Tomatensuppe f; sopa de tomate f; zuppa di pomodoro f
        omelette; omelette f; Omelett n; tortilla f; frittata f
        coffee; café m; Kaffee m; café m; caffè m
        tea; thé m; Tee m; té m; tè m
        orange juice; jus d'orange m; Orangensaft m; zumo de naranja m; succo d'arancia m
        lemonade; limonade f; Limonade f; limonada f; limonata f
        glass of wine; verre de vin m; Glas Wein n; copa de vino f; bicchiere di vino m
    """,
    "event": """
        jazz concert; concert de jazz m; Jazzkonzert n; concierto de jazz m; concerto jazz m
        book fair; foire du livre f; Buchmesse f; feria del libro f; fiera del libro f
        lantern parade; défilé des lanternes m; Laternenumzug m; desfile de farolillos m; sfilata delle lanterne f
        flower market; marché aux fleurs m; Blumenmarkt m; mercado de flores m; mercato dei fiori m
        puppet show; spectacle de marionnettes m; Puppenspiel n; espectáculo de marionetas m; spettacolo di marionette m
        boat race; course de bateaux f; Bootsrennen n; carrera de barcos f; gara di barche f
        chess evening; soirée d'échecs f; Schachabend m; noche de ajedrez f; serata di scacchi f
        wine tasting; dégustation de vins f; Weinprobe f; cata de vinos f; degustazione di vini f
        film night; soirée cinéma f; Filmabend m; noche de cine f; serata di cinema f
        cooking class; cours de cuisine m; Kochkurs m; clase de cocina f; corso di cucina m
        guided walk; promenade guidée f; Stadtführung f; visita guiada f; passeggiata guidata f
        choir evening; soirée chorale f; Chorabend m; noche coral f; serata corale f
    """,
}
SPLIT_TABLES = frozenset({"item"})
"""Tables whose entries belong to splits; the others are small and known to every split."""


@dataclass(frozen=True, slots=True)
class Noun:
    """A word of one language; ``gender`` is m, f, n, or empty where no article depends on it."""

    text: str
    gender: str = ""


def _noun(text: str) -> Noun:
    head, _, last = text.rpartition(" ")
    return Noun(head, last) if head and last in {"m", "f", "n"} else Noun(text)


def _table(text: str) -> Mapping[str, Mapping[Language, Noun]]:
    rows = {}
    for line in text.strip().splitlines():
        cells = [cell.strip() for cell in line.split(";")]
        row = {language: _noun(cell) for language, cell in zip(LANGUAGES, cells, strict=True)}
        rows[cells[0].lower().replace(" ", "_")] = MappingProxyType(row)
    return MappingProxyType(rows)


TABLES: Mapping[str, Mapping[str, Mapping[Language, Noun]]] = MappingProxyType(
    {name: _table(text) for name, text in _TABLE_TEXT.items()}
)
"""table -> key (English, lower case, underscores) -> language -> word."""


@cache
def keys(table: str, split: Split) -> tuple[str, ...]:
    """The keys of a table that ``split`` may use: its own ones in ``SPLIT_TABLES``, else all of them."""
    if table not in SPLIT_TABLES:
        return tuple(TABLES[table])
    return tuple(key for key in TABLES[table] if split_of("value", table, key) == split)


def draw_key(table: str, source: Source, split: Split) -> str:
    """One key of a table for ``split``; KeyError for an unknown table."""
    return source.pick(keys(table, split))


def word(table: str, key: str, language: Language) -> str:
    """The bare word, without article; KeyError for an unknown table or key."""
    return TABLES[table][key][language].text


def _vowel(text: str) -> bool:
    return text[0].lower() in "aeiouàâäéèêëíîïóôöúûüh"


def _english(text: str, gender: str) -> dict[str, str]:
    article = "an" if text[0].lower() in "aeiou" else "a"
    return {"a": f"{article} {text}", "a_acc": f"{article} {text}", "the": f"the {text}", "my": f"my {text}",
            "your": f"your {text}", "to": f"to the {text}", "of": f"of the {text}"}  # fmt: skip


def _french(text: str, gender: str) -> dict[str, str]:
    male, elided = gender == "m", _vowel(text)
    the = f"l'{text}" if elided else f"le {text}" if male else f"la {text}"
    a = f"un {text}" if male else f"une {text}"
    return {"a": a, "a_acc": a, "the": the,
            "my": f"mon {text}" if male or elided else f"ma {text}", "your": f"votre {text}",
            "to": f"au {text}" if male and not elided else f"à {the}",
            "of": f"du {text}" if male and not elided else f"de {the}"}  # fmt: skip


def _german(text: str, gender: str) -> dict[str, str]:
    the = {"m": "der", "f": "die", "n": "das"}[gender]
    end = {"m": "en", "f": "e", "n": ""}[gender]
    # An adjective before the noun takes -en in the dative and, for masculine nouns, in the accusative.
    first, _, rest = text.partition(" ")
    weak = f"{first}n {rest}" if rest and first.endswith("e") else text
    acc = weak if gender == "m" else text
    return {"a": f"ein{'e' if gender == 'f' else ''} {text}", "a_acc": f"ein{end} {acc}", "the": f"{the} {text}",
            "my": f"mein{end} {acc}", "your": f"Ihr{end} {acc}", "to": f"{'zur' if gender == 'f' else 'zum'} {weak}",
            "of": f"{'von der' if gender == 'f' else 'vom'} {weak}"}  # fmt: skip


def _spanish(text: str, gender: str) -> dict[str, str]:
    male = gender == "m"
    a = f"un {text}" if male else f"una {text}"
    return {"a": a, "a_acc": a, "the": f"el {text}" if male else f"la {text}", "my": f"mi {text}",
            "your": f"su {text}", "to": f"al {text}" if male else f"a la {text}",
            "of": f"del {text}" if male else f"de la {text}"}  # fmt: skip


def _italian(text: str, gender: str) -> dict[str, str]:
    male, low = gender == "m", text.lower()
    hard = low[0] in "zxy" or low[:2] in {"gn", "ps", "pn"} or (low[0] == "s" and low[1] not in "aeiouh")
    if _vowel(text):
        the, to, of = f"l'{text}", f"all'{text}", f"dell'{text}"
        a = f"un {text}" if male else f"un'{text}"
    elif not male:
        the, to, of, a = f"la {text}", f"alla {text}", f"della {text}", f"una {text}"
    elif hard:
        the, to, of, a = f"lo {text}", f"allo {text}", f"dello {text}", f"uno {text}"
    else:
        the, to, of, a = f"il {text}", f"al {text}", f"del {text}", f"un {text}"
    my, your = ("il mio", "il suo") if male else ("la mia", "la sua")
    return {"a": a, "a_acc": a, "the": the, "my": f"{my} {text}", "your": f"{your} {text}", "to": to, "of": of}


_GRAMMAR: dict[Language, Callable[[str, str], dict[str, str]]] = {
    "en": _english, "fr": _french, "de": _german, "es": _spanish, "it": _italian}  # fmt: skip


@cache
def forms(table: str, key: str, language: Language) -> Mapping[str, str]:
    """A noun with its articles: a, a_acc (German accusative), the, my, your (both accusative), to, of; and bare."""
    return forms_of(TABLES[table][key][language], language)


def forms_of(noun: Noun, language: Language) -> Mapping[str, str]:
    """What ``forms`` gives, of a noun that need not be in a table."""
    return MappingProxyType({"bare": noun.text, **_GRAMMAR[language](noun.text, noun.gender)})


def weekday(key: str, language: Language, *, every: bool = False) -> str:
    """A weekday with its preposition: "on Monday", or with ``every`` "on Mondays", "le lundi", "montags"."""
    name = word("weekday", key, language)
    plural = name if name.endswith("s") else f"{name}s"
    if every:
        italian = "la" if key == "sunday" else "il"
        table = {"en": f"on {name}s", "fr": f"le {name}", "de": f"{name.lower()}s", "es": f"los {plural}"}
        return table.get(language, f"{italian} {name}")
    return {"en": f"on {name}", "fr": name, "de": f"am {name}", "es": f"el {name}"}.get(language, name)


def date(value: str, language: Language) -> str:
    """An ``MM-DD`` item of the ``date`` inventory as it is written in ``language``: "14 March", "14. März"."""
    month = tuple(TABLES["month"].values())[int(value[:2]) - 1][language].text
    day = int(value[3:])
    return {"de": f"{day}. {month}", "es": f"{day} de {month}"}.get(language, f"{day} {month}")


def price(value: str | int, language: Language) -> str:
    """An amount of whole euros with the currency: "9 euros", "9 Euro"."""
    return f"{value} {CURRENCY[language]}"
