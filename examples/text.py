"""A text with something to learn in it, made by a seeded grammar: the same characters on every machine."""

import hashlib
from random import Random

SEED = 20260
CHARACTERS = 500_000
SHA256 = "9bc20b7528daaebecb09b9a7f10402ef060dbcd5d62f6c1a445705764e93f4ce"

FUNCTION_WORDS = ("the", "a", "this", "every", "some", "these")
ONSETS = "b c d f g h k l m n p r s t v w br ch cl dr fl gr pl sh sl st th tr".split()
VOWELS = "a e i o u ai ea oo ou".split()
CODAS = ["", "", "", *"l m n r s t ck nd rd st".split()]


class Grammar:
    """Sentences of a made-up language.

    What a model can learn in it, from easy to hard: spelling, which words are frequent, their order, quotes that close,
    agreement of subject and verb in number across a relative clause, the words of a paragraph's topic.
    """

    def __init__(self, seed: int):
        # Only .random() is drawn from: Python promises that its sequence never changes, not that of .choice().
        self.uniform = Random(seed).random
        self.used: set[str] = set(FUNCTION_WORDS)
        topics = range(12)
        self.names = [self.word(2).capitalize() for _ in range(40)]
        self.nouns = [[self.word(1 + (n > 6)) for n in range(24)] for _ in topics]
        self.verbs = [[self.word(1 + (n > 5)) for n in range(12)] for _ in topics]
        self.adjectives = [[self.word(1 + (n > 5)) + "y" for n in range(12)] for _ in topics]
        self.topic = 0

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def word(self, syllables: int) -> str:
        """A new word, unlike all before it."""
        while True:
            parts = (table[self.below(len(table))] for _ in range(syllables) for table in (ONSETS, VOWELS, CODAS))
            made = "".join(parts)
            if made not in self.used and len(made) > 2:
                self.used.add(made)
                return made

    def frequent(self, words: list[str]) -> str:
        """A word of the list, the first ones far more often; products only, since powers differ between C libraries."""
        x = self.uniform()
        return words[int(x * x * x * len(words))]

    def of_topic(self, tables: list[list[str]]) -> str:
        """Mostly a word of the paragraph's topic."""
        return self.frequent(tables[self.topic if self.uniform() < 0.8 else self.below(len(tables))])

    def noun_phrase(self, depth: int) -> tuple[str, bool]:
        """A phrase, and whether it is plural."""
        if self.uniform() < 0.25:
            return self.frequent(self.names), False
        plural = self.uniform() < 0.4
        determiner = ("the", "some", "these")[self.below(3)] if plural else ("the", "a", "this", "every")[self.below(4)]
        words = [determiner]
        if self.uniform() < 0.4:
            words.append(self.of_topic(self.adjectives))
        words.append(self.of_topic(self.nouns) + ("s" if plural else ""))
        if depth and self.uniform() < 0.25:
            words += ["that", self.verb_phrase(plural, depth - 1)]
        return " ".join(words), plural

    def verb_phrase(self, plural: bool, depth: int) -> str:
        """A verb that agrees with its subject, and what it is done to."""
        verb = self.of_topic(self.verbs) + ("" if plural else "es")
        words = [verb]
        if self.uniform() < 0.75:
            words.append(self.noun_phrase(depth)[0])
        if self.uniform() < 0.3:
            words += [("in", "near", "with", "under")[self.topic % 4], self.noun_phrase(0)[0]]
        return " ".join(words)

    def clause(self) -> str:
        subject, plural = self.noun_phrase(1)
        return f"{subject} {self.verb_phrase(plural, 1)}"

    def sentence(self) -> str:
        kind = self.uniform()
        if kind < 0.15:
            return f'"{_capital(self.clause())}," says {self.frequent(self.names)}.'
        if kind < 0.35:
            return f"{_capital(self.clause())}, {('and', 'but', 'so')[self.below(3)]} {self.clause()}."
        return f"{_capital(self.clause())}."

    def paragraph(self) -> str:
        self.topic = self.below(len(self.nouns))
        return " ".join(self.sentence() for _ in range(3 + self.below(5)))


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def generate(characters: int = CHARACTERS, seed: int = SEED) -> str:
    """The first `characters` of the text."""
    grammar = Grammar(seed)
    paragraphs, length = [], 0
    while length < characters:
        paragraphs.append(grammar.paragraph())
        length += len(paragraphs[-1]) + 1
    return "\n".join(paragraphs)[:characters]


def load() -> str:
    """The text, checked: a loss means something only on the same text."""
    text = generate()
    if (found := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
        raise RuntimeError(f"examples/text.py makes another text ({found[:12]}) than the one pinned ({SHA256[:12]})")
    return text
