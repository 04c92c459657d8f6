"""Invented names, by a seeded syllable grammar: no model has met them."""

import random

CLUSTERS = ["br", "dr", "fl", "gl", "kl", "kr", "pl", "sk", "sv", "tr", "vr", "zh", "zv"]
ONSETS = [*"bdfghjklmnpqrstvz", *CLUSTERS]
VOWELS = "aeiou"
CODAS = [*"lmnrs", "th"]
# The ending tells the kinds of names apart, for readers of the files. The plainer endings are left
# out because they make names that exist: Polonia, Samaria, Davenport, Petrograd, Danish, Japanese.
ENDINGS = {
    "country": ["ovia", "undia", "ustan", "eland"],
    "capital": ["gard", "holm", "dell", "spire", "moor"],
    "language": ["evic", "undish", "umese"],
    "first": ["iko", "enna", "ulf", "ael"],
    "last": ["ovez", "ard", "ulin", "eth"],
}


class Names:
    """Draws names, none of which is contained in another: an answer is scored by containment."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: list[str] = []

    def draw(self, kind: str) -> str:
        rng = self.rng
        while True:
            syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2))]
            name = "".join(syllables) + rng.choice(CODAS) + rng.choice(ENDINGS[kind])
            if not any(name in other or other in name for other in self.used):
                self.used.append(name)
                return name.capitalize()
