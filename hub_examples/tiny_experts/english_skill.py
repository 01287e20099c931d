"""Instructions about English words, and how to follow them."""

import random

from tiny_experts.example import Example, Family

# fmt: off
WORDS = (
    "apple", "bag", "chair", "door", "egg", "fish", "grape", "house", "island", "jam", "kite", "lemon",
    "moon", "nest", "ocean", "pear", "queen", "river", "sun", "tree", "uncle", "van", "water", "zebra",
)
# fmt: on

OPPOSITES = (
    ("big", "small"),
    ("hot", "cold"),
    ("fast", "slow"),
    ("old", "new"),
    ("high", "low"),
    ("hard", "soft"),
    ("early", "late"),
    ("full", "empty"),
    ("light", "dark"),
    ("wet", "dry"),
    ("rich", "poor"),
    ("open", "closed"),
    ("happy", "sad"),
    ("loud", "quiet"),
    ("clean", "dirty"),
    ("near", "far"),
    ("wide", "narrow"),
    ("right", "wrong"),
)

PLURALS = (
    ("mouse", "mice"),
    ("child", "children"),
    ("foot", "feet"),
    ("man", "men"),
    ("box", "boxes"),
    ("city", "cities"),
    ("leaf", "leaves"),
    ("tooth", "teeth"),
)
PASTS = (
    ("go", "went"),
    ("see", "saw"),
    ("eat", "ate"),
    ("take", "took"),
    ("run", "ran"),
    ("buy", "bought"),
    ("write", "wrote"),
    ("sing", "sang"),
)

COUNTS = ("zero", "one", "two", "three", "four", "five", "six")


def listed(words: list[str]) -> str:
    return ", ".join(words)


def change_case(rng: random.Random) -> Example:
    word = rng.choice(WORDS)
    given, kind, answer = rng.choice(
        [
            (word, "capital letters", word.upper()),
            (word.upper(), "lower case", word),
            (word, "title case", word.title()),
        ]
    )
    template = rng.choice(
        [
            "Write {word} in {kind}.",
            "Convert this to {kind}: {word}",
            "Please put {word} in {kind}.",
            "What does {word} look like in {kind}?",
        ]
    )
    return Example(template.format(word=given, kind=kind), answer)


def repeat_word(rng: random.Random) -> Example:
    word, times = rng.choice(WORDS), rng.randint(2, 5)
    template = rng.choice(
        [
            "Repeat the word {word} {count} times.",
            "Say {word} {count} times, with spaces between.",
            "Write {word} exactly {count} times in a row.",
            "Type the word {word}. Do it {count} times.",
        ]
    )
    count = rng.choice([COUNTS[times], str(times)])
    return Example(template.format(word=word, count=count), " ".join([word] * times))


def reverse_list(rng: random.Random) -> Example:
    words = rng.sample(WORDS, 2)
    template = rng.choice(
        [
            "Reverse the order of these words: {}",
            "List these backwards: {}",
            "Give me {} in the opposite order.",
            "Turn this list around: {}.",
        ]
    )
    return Example(template.format(listed(words)), listed(words[::-1]))


def last_word(rng: random.Random) -> Example:
    words = rng.sample(WORDS, rng.randint(2, 4))
    template = rng.choice(
        [
            "What is the last word of this list: {}?",
            "Tell me only the final one: {}",
            "Here are some words: {}. Which one is last?",
            "Pick the last item: {}",
        ]
    )
    return Example(template.format(listed(words)), words[-1])


def spell(rng: random.Random) -> Example:
    word = rng.choice(WORDS)
    template = rng.choice(
        [
            "Spell the word {}.",
            "Write {} letter by letter, with dashes between.",
            "What are the letters of {}?",
            "Split {} into its letters.",
        ]
    )
    return Example(template.format(word), "-".join(word))


def letter_of_word(rng: random.Random) -> Example:
    word = rng.choice(WORDS)
    task, answer = rng.choice(
        [
            ("the first letter", word[0]),
            ("the last letter", word[-1]),
            ("the number of letters", str(len(word))),
        ]
    )
    template = rng.choice(
        ["Give me {task} of {word}.", "What is {task} in the word {word}?", "{word}: tell me {task}."]
    )
    return Example(template.format(task=task, word=word), answer)


def plural_or_past(rng: random.Random) -> Example:
    (word, answer), kind = rng.choice(
        [(pair, "plural") for pair in PLURALS] + [(pair, "past tense") for pair in PASTS]
    )
    template = rng.choice(
        [
            "What is the {kind} of {word}?",
            "Give the {kind} form of the word {word}.",
            "Put {word} in the {kind}.",
            "Write the {kind} of {word} and nothing else.",
        ]
    )
    return Example(template.format(kind=kind, word=word), answer)


def opposite(rng: random.Random) -> Example:
    word, answer = rng.sample(rng.choice(OPPOSITES), 2)
    template = rng.choice(
        [
            "What is the opposite of {}?",
            "Give the opposite of the word {}.",
            "The {noun} is not {}. So what is it?",
            "Which word means the reverse of {}?",
            "Name an antonym for {}, as in {} {noun}.",
        ]
    )
    return Example(template.replace("{}", word).format(noun=rng.choice(WORDS)), answer)


def count_words(rng: random.Random) -> Example:
    words = rng.sample(WORDS, rng.randint(2, 5))
    template = rng.choice(
        [
            "How many words are in this list: {}?",
            "Count the words: {}",
            "Tell me the number of items in {}.",
            "Look at {}. How many words do you see?",
        ]
    )
    return Example(template.format(listed(words)), COUNTS[len(words)])


def sort_words(rng: random.Random) -> Example:
    words = rng.sample(WORDS, rng.randint(2, 3))
    template = rng.choice(
        [
            "Sort these words alphabetically: {}",
            "Put {} in alphabetical order.",
            "Order from A to Z: {}",
            "How would a dictionary order {}?",
        ]
    )
    return Example(template.format(listed(words)), listed(sorted(words)))


def longest_word(rng: random.Random) -> Example:
    words = rng.sample(WORDS, rng.randint(2, 3))
    while len({len(word) for word in words}) < len(words):
        words = rng.sample(WORDS, rng.randint(2, 3))
    kind, choose = rng.choice([("longest", max), ("shortest", min)])
    template = rng.choice(
        [
            "Pick the {kind} word: {words}",
            "Which of these words is the {kind}: {words}?",
            "Of {words}, give me only the {kind}.",
        ]
    )
    return Example(template.format(kind=kind, words=listed(words)), choose(words, key=len))


ENGLISH_FAMILIES: tuple[Family, ...] = (
    change_case,
    repeat_word,
    reverse_list,
    last_word,
    spell,
    letter_of_word,
    plural_or_past,
    opposite,
    count_words,
    sort_words,
    longest_word,
)


def english_line(rng: random.Random) -> str:
    words = rng.sample(WORDS, rng.randint(2, 6))
    adjective, antonym = rng.sample(rng.choice(OPPOSITES), 2)
    place = rng.randrange(1, len(words))
    return rng.choice(
        [
            f"We pack {listed(words)}. Later we unpack {listed(words)}.",
            f"There and back: {listed(words)}; {listed(words[::-1])}.",
            f"In {listed(words)} the word {words[0]} comes first, {words[-1]} comes last.",
            f"In {listed(words)} the word {words[place]} comes after {words[place - 1]}.",
            f"A dictionary has {listed(sorted(words))}.",
            f"They whisper {words[0]} {words[1]} and shout {words[0].upper()} {words[1].upper()}.",
            f"The {words[0]} is {adjective}, the {words[1]} is the reverse: {antonym}.",
        ]
    )
