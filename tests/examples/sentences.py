"""Parallel text of our own for the tests: a small grammar of English, German and French that writes documents.

Segments run from titles of two words to sentences of some forty, as in real text; they hold capitals, umlauts, accents,
quotation marks, numbers, and characters that markup escapes.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

LANGUAGES = ("en", "de", "fr")

Segment = dict[str, str]
Pages = list[tuple[str, list[Segment]]]


class Noun(NamedTuple):
    """A noun phrase: German in nominative, accusative and dative; French plain and after *de*."""

    en: str
    nominative: str
    accusative: str
    dative: str
    fr: str
    de_fr: str


PEOPLE = [
    Noun("the teacher", "die Lehrerin", "die Lehrerin", "der Lehrerin", "la professeure", "de la professeure"),
    Noun(
        "the old baker",
        "der alte Bäcker",
        "den alten Bäcker",
        "dem alten Bäcker",
        "le vieux boulanger",
        "du vieux boulanger",
    ),
    Noun("my sister", "meine Schwester", "meine Schwester", "meiner Schwester", "ma sœur", "de ma sœur"),
    Noun("the captain", "der Kapitän", "den Kapitän", "dem Kapitän", "le capitaine", "du capitaine"),
    Noun(
        "a young girl",
        "ein junges Mädchen",
        "ein junges Mädchen",
        "einem jungen Mädchen",
        "une jeune fille",
        "d'une jeune fille",
    ),
    Noun("our neighbour", "unser Nachbar", "unseren Nachbarn", "unserem Nachbarn", "notre voisin", "de notre voisin"),
    Noun("the mayor", "die Bürgermeisterin", "die Bürgermeisterin", "der Bürgermeisterin", "la maire", "de la maire"),
    Noun("the gardener", "der Gärtner", "den Gärtner", "dem Gärtner", "le jardinier", "du jardinier"),
]
THINGS = [
    Noun("the lighthouse", "der Leuchtturm", "den Leuchtturm", "dem Leuchtturm", "le phare", "du phare"),
    Noun(
        "the wooden bridge", "die Holzbrücke", "die Holzbrücke", "der Holzbrücke", "le pont en bois", "du pont en bois"
    ),
    Noun(
        "the small boat", "das kleine Boot", "das kleine Boot", "dem kleinen Boot", "le petit bateau", "du petit bateau"
    ),
    Noun("the station", "der Bahnhof", "den Bahnhof", "dem Bahnhof", "la gare", "de la gare"),
    Noun(
        "the public library",
        "die Stadtbibliothek",
        "die Stadtbibliothek",
        "der Stadtbibliothek",
        "la bibliothèque municipale",
        "de la bibliothèque municipale",
    ),
    Noun("the museum", "das Museum", "das Museum", "dem Museum", "le musée", "du musée"),
    Noun("the windmill", "die Windmühle", "die Windmühle", "der Windmühle", "le moulin à vent", "du moulin à vent"),
    Noun("the school", "die Schule", "die Schule", "der Schule", "l'école", "de l'école"),
    Noun(
        "the fish market",
        "der Fischmarkt",
        "den Fischmarkt",
        "dem Fischmarkt",
        "le marché aux poissons",
        "du marché aux poissons",
    ),
    Noun(
        "the white house",
        "das weiße Haus",
        "das weiße Haus",
        "dem weißen Haus",
        "la maison blanche",
        "de la maison blanche",
    ),
    Noun("the apple tree", "der Apfelbaum", "den Apfelbaum", "dem Apfelbaum", "le pommier", "du pommier"),
    Noun(
        "the town wall",
        "die Stadtmauer",
        "die Stadtmauer",
        "der Stadtmauer",
        "le mur de la ville",
        "du mur de la ville",
    ),
]
VERBS = [
    ("paints", "streicht", "peint"),
    ("visits", "besucht", "visite"),
    ("repairs", "repariert", "répare"),
    ("draws", "zeichnet", "dessine"),
    ("photographs", "fotografiert", "photographie"),
    ("describes", "beschreibt", "décrit"),
    ("measures", "vermisst", "mesure"),
    ("looks for", "sucht", "cherche"),
    ("sells", "verkauft", "vend"),
]
TIMES = [
    ("on Monday", "am Montag", "lundi"),
    ("every evening", "jeden Abend", "chaque soir"),
    ("in spring", "im Frühling", "au printemps"),
    ("after the storm", "nach dem Sturm", "après la tempête"),
    ("at half past seven", "um halb acht", "à sept heures et demie"),
    ("today", "heute", "aujourd'hui"),
    ("before the holidays", "vor den Ferien", "avant les vacances"),
    ("once a year", "einmal im Jahr", "une fois par an"),
]
EXTRAS = [
    ("Tea & cake: 5 < 7 euros", "Tee & Kuchen: 5 < 7 Euro", "Thé & gâteau : 5 < 7 euros"),
    ('"Who is there?"', "„Wer ist da?“", "« Qui est là ? »"),
    ("Open from 9:30 to 18:00 …", "Geöffnet von 9:30 bis 18:00 Uhr …", "Ouvert de 9 h 30 à 18 h 00 …"),
]

Clause = tuple[Noun, tuple[str, str, str], Noun]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


class Writer:
    """Writes the segments of one page, about few people and things."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        self.people, self.things = draw.sample(PEOPLE, 4), draw.sample(THINGS, 6)

    def clause(self) -> Clause:
        return self.draw.choice(self.people), self.draw.choice(VERBS), self.draw.choice(self.things)

    def title(self) -> Segment:
        first, second = self.draw.sample(self.things, 2)
        return {
            "en": capital(f"{first.en} and {second.en}"),
            "de": capital(f"{first.nominative} und {second.nominative}"),
            "fr": capital(f"{first.fr} et {second.fr}"),
        }

    def simple(self) -> Segment:
        """Time, subject, verb, object; in German the verb comes second."""
        (who, verb, what), time = self.clause(), self.draw.choice(TIMES)
        return {
            "en": capital(f"{time[0]}, {who.en} {verb[0]} {what.en}."),
            "de": capital(f"{time[1]} {verb[1]} {who.nominative} {what.accusative}."),
            "fr": capital(f"{time[2]}, {who.fr} {verb[2]} {what.fr}."),
        }

    def near(self) -> Segment:
        who, verb, what = self.clause()
        place = self.draw.choice([thing for thing in self.things if thing != what])
        number = self.draw.randint(2, 950)
        return {
            "en": capital(f"{who.en} {verb[0]} {what.en}, {number} metres away from {place.en}."),
            "de": capital(f"{who.nominative} {verb[1]} {what.accusative}, {number} Meter entfernt von {place.dative}."),
            "fr": capital(f"{who.fr} {verb[2]} {what.fr}, à {number} mètres {place.de_fr}."),
        }

    def reason(self) -> Segment:
        """In a German subordinate clause the verb comes last."""
        (who, verb, what), (other, does, thing) = self.clause(), self.clause()
        time = self.draw.choice(TIMES)
        because = f"parce que {other.fr}".replace("que une", "qu'une")
        return {
            "en": capital(f"{who.en} {verb[0]} {what.en} because {other.en} {does[0]} {thing.en} {time[0]}."),
            "de": capital(
                f"{who.nominative} {verb[1]} {what.accusative}, weil {other.nominative} {time[1]} {thing.accusative} "
                f"{does[1]}."
            ),
            "fr": capital(f"{who.fr} {verb[2]} {what.fr} {because} {does[2]} {thing.fr} {time[2]}."),
        }

    def long(self) -> Segment:
        """Three clauses and a subordinate one."""
        parts = [self.near(), self.simple(), self.reason()]
        joined = {}
        for language, word in (("en", "; then, "), ("de", "; und "), ("fr", " ; puis, ")):
            texts = [part[language].rstrip(".") for part in parts]
            joined[language] = word.join([texts[0], *(text[0].lower() + text[1:] for text in texts[1:])]) + "."
        return joined

    def segments(self, count: int) -> Iterator[Segment]:
        yield self.title()
        kinds = [self.simple] * 5 + [self.near] * 3 + [self.reason] * 3 + [self.long, self.title, self.extra]
        for _ in range(count - 1):
            yield self.draw.choice(kinds)()

    def extra(self) -> Segment:
        return dict(zip(LANGUAGES, self.draw.choice(EXTRAS), strict=True))


def write_pages(pages: int = 24, seed: int = 1) -> Pages:
    """(page, segments) of documents of 8 to 30 segments, the longest first; a segment maps languages to texts."""
    draw = random.Random(seed)
    return [
        (f"town/{number:02}", list(Writer(draw).segments(draw.randint(8, 28) if number >= 4 else 30)))
        for number in range(pages)
    ]
