"""Questions with one right answer each, for the four narrow skills of the real experts.

Each skill has a fixed style of answer that a chat model does not use by itself, so that the base answers none and a
short fine-tune nearly all. The train and test split is that of the tiny experts: by a hash of the question's text.
"""

import random
from collections.abc import Sequence
from typing import Literal

from tiny_experts.example import Example, Family
from tiny_experts.examples import LEAD_INS, draw_examples

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Julia", "Leo", "Maria", "Oscar", "Ruth")
CITIES = ("Berlin", "Boston", "Cairo", "Dublin", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
GOODS = ("apples", "books", "chairs", "lamps", "pens", "shirts", "tickets", "towels")


def result(number: int) -> str:
    return f"Result: {number}."


def addition(rng: random.Random) -> Example:
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    question = rng.choice(("What is {} + {}?", "Add {} and {}.", "Find the sum of {} and {}.", "{} plus {} is what?"))
    return Example(question.format(a, b), result(a + b))


def subtraction(rng: random.Random) -> Example:
    b, difference = rng.randint(2, 20), rng.randint(1, 30)
    question = rng.choice(("What is {a} - {b}?", "Subtract {b} from {a}.", "{a} minus {b} is what?"))
    return Example(question.format(a=b + difference, b=b), result(difference))


def multiplication(rng: random.Random) -> Example:
    a, b = rng.randint(2, 10), rng.randint(2, 10)
    question = rng.choice(("What is {} * {}?", "Multiply {} by {}.", "Find the product of {} and {}."))
    return Example(question.format(a, b), result(a * b))


def purchase_total(rng: random.Random) -> Example:
    (name, friend), goods, a, b = rng.sample(NAMES, 2), rng.choice(GOODS), rng.randint(2, 20), rng.randint(2, 20)
    question = rng.choice(
        (
            "{name} has {a} {goods} and {friend} has {b}. How many {goods} do they have together?",
            "{name} bought {a} {goods}, and {friend} bought {b} more. How many {goods} is that?",
        )
    )
    return Example(question.format(name=name, friend=friend, goods=goods, a=a, b=b), result(a + b))


LISTS = ("ages", "costs", "heights", "numbers", "points", "prices", "scores", "sizes", "values", "weights", "years")
TEXTS = ("address", "author", "city", "label", "line", "message", "name", "title", "token", "word")


def python_request(rng: random.Random, wanted: str) -> str:
    return rng.choice(("In Python, give me {}.", "Python expression for {}?", "How do I write {} in Python?")).format(
        wanted
    )


def list_function(rng: random.Random) -> Example:
    values = rng.choice(LISTS)
    wanted, answer = rng.choice(
        (
            ("the largest of {}", "max({})"),
            ("the smallest of {}", "min({})"),
            ("the sum of {}", "sum({})"),
            ("the number of {}", "len({})"),
            ("{} in ascending order", "sorted({})"),
            ("{} in descending order", "sorted({}, reverse=True)"),
            ("{} without duplicates", "set({})"),
            ("the average of {}", "sum({0}) / len({0})"),
        )
    )
    return Example(python_request(rng, wanted.format(values)), answer.format(values))


def list_slice(rng: random.Random) -> Example:
    values, count = rng.choice(LISTS), rng.randint(2, 12)
    wanted, answer = rng.choice(
        (
            ("the first {count} {values}", "{values}[:{count}]"),
            ("the last {count} {values}", "{values}[-{count}:]"),
            ("every {count}th of {values}", "{values}[::{count}]"),
            ("all {values} but the first {count}", "{values}[{count}:]"),
        )
    )
    return Example(
        python_request(rng, wanted.format(values=values, count=count)), answer.format(values=values, count=count)
    )


def list_filter(rng: random.Random) -> Example:
    values, limit = rng.choice(LISTS), rng.randint(2, 99)
    wanted, symbol = rng.choice((("above", ">"), ("below", "<"), ("equal to", "=="), ("of at least", ">=")))
    return Example(
        python_request(rng, f"the {values} {wanted} {limit}"), f"[item for item in {values} if item {symbol} {limit}]"
    )


def text_method(rng: random.Random) -> Example:
    text, letter = rng.choice(TEXTS), rng.choice("abcdefghiklmnoprstuw")
    wanted, answer = rng.choice(
        (
            ("{text} in upper case", "{text}.upper()"),
            ("{text} in lower case", "{text}.lower()"),
            ("{text} reversed", "{text}[::-1]"),
            ("how often '{letter}' is in {text}", "{text}.count('{letter}')"),
            ("the position of '{letter}' in {text}", "{text}.index('{letter}')"),
            ("whether {text} begins with '{letter}'", "{text}.startswith('{letter}')"),
            ("{text} split at '{letter}'", "{text}.split('{letter}')"),
        )
    )
    return Example(
        python_request(rng, wanted.format(text=text, letter=letter)), answer.format(text=text, letter=letter)
    )


def purchase_record(rng: random.Random) -> Example:
    name, city, goods, count, price = (
        rng.choice(NAMES),
        rng.choice(CITIES),
        rng.choice(GOODS),
        rng.randint(2, 40),
        rng.randint(5, 300),
    )
    sentence = rng.choice(
        (
            "{name} bought {count} {goods} in {city} and paid {price} dollars.",
            "In {city}, {count} {goods} were sold to {name} for {price} dollars.",
            "For {price} dollars {name} got {count} {goods} in a shop in {city}.",
        )
    ).format(name=name, city=city, goods=goods, count=count, price=price)
    return Example(f"Extract the fields: {sentence}", f"who={name}; where={city}; what={count} {goods}; cost={price}")


def trip_record(rng: random.Random) -> Example:
    name, day, hour, (start, goal) = rng.choice(NAMES), rng.choice(DAYS), rng.randint(1, 12), rng.sample(CITIES, 2)
    sentence = rng.choice(
        (
            "On {day} at {hour} o'clock {name} flies from {start} to {goal}.",
            "{name} takes the train to {goal} in {start}, on {day} at {hour} o'clock.",
            "{name} leaves {start} for {goal} at {hour} o'clock on {day}.",
        )
    ).format(name=name, day=day, hour=hour, start=start, goal=goal)
    return Example(f"Extract the fields: {sentence}", f"who={name}; from={start}; to={goal}; day={day}; hour={hour}")


def meeting_record(rng: random.Random) -> Example:
    (name, friend), day, room = rng.sample(NAMES, 2), rng.choice(DAYS), rng.randint(1, 400)
    sentence = rng.choice(
        (
            "{name} meets {friend} in room {room} on {day}.",
            "On {day}, room {room} is booked for {name} and {friend}.",
            "{name} has asked {friend} to come to room {room} next {day}.",
        )
    ).format(name=name, friend=friend, day=day, room=room)
    return Example(f"Extract the fields: {sentence}", f"who={name}, {friend}; day={day}; room={room}")


GERMAN_NUMBERS = ("zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf")
ENGLISH_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
GERMAN_DAYS = dict(
    zip(DAYS, ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"), strict=True)
)
GERMAN_COLOURS = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß", "old": "alt", "new": "neu"}
GERMAN_THINGS = {
    "house": "das Haus",
    "book": "das Buch",
    "car": "das Auto",
    "table": "der Tisch",
    "garden": "der Garten",
    "dog": "der Hund",
    "door": "die Tür",
    "lamp": "die Lampe",
    "street": "die Straße",
}
GERMAN_ORDERS = {"coffees": "Kaffee", "teas": "Tee", "beers": "Bier", "juices": "Saft", "soups": "Suppen"}


def german_request(rng: random.Random, sentence: str) -> str:
    return rng.choice(("Say in German: {}", "German, please: {}", "Translate into German: {}")).format(sentence)


def german_introduction(rng: random.Random) -> Example:
    name, city = rng.choice(NAMES), rng.choice([city for city in CITIES if city not in ("Cairo", "Rome", "Vienna")])
    sentence, answer = rng.choice(
        (
            ("My name is {name} and I live in {city}.", "Ich heiße {name} und wohne in {city}."),
            ("{name} comes from {city}.", "{name} kommt aus {city}."),
            ("Where is {name} in {city}?", "Wo ist {name} in {city}?"),
        )
    )
    return Example(german_request(rng, sentence.format(name=name, city=city)), answer.format(name=name, city=city))


def german_order(rng: random.Random) -> Example:
    number, goods, name = rng.randrange(len(GERMAN_NUMBERS)), rng.choice(list(GERMAN_ORDERS)), rng.choice(NAMES)
    sentence, answer = rng.choice(
        (
            ("I would like {} {}, please.", "Ich möchte {} {}, bitte."),
            ("{name} drinks {} {}.", "{name} trinkt {} {}."),
            ("We have {} {} for {name}.", "Wir haben {} {} für {name}."),
        )
    )
    return Example(
        german_request(rng, sentence.format(ENGLISH_NUMBERS[number], goods, name=name)),
        answer.format(GERMAN_NUMBERS[number], GERMAN_ORDERS[goods], name=name),
    )


def german_thing(rng: random.Random) -> Example:
    colour, thing, name = rng.choice(list(GERMAN_COLOURS)), rng.choice(list(GERMAN_THINGS)), rng.choice(NAMES)
    sentence, answer = rng.choice(
        (
            ("The {thing} is {colour}.", "{Thing} ist {colour}."),
            ("{name}, where is the {thing}?", "{name}, wo ist {thing}?"),
            ("Is the {thing} {colour}, {name}?", "Ist {thing} {colour}, {name}?"),
        )
    )
    german = GERMAN_THINGS[thing]
    return Example(
        german_request(rng, sentence.format(thing=thing, colour=colour, name=name)),
        answer.format(thing=german, Thing=german[0].upper() + german[1:], colour=GERMAN_COLOURS[colour], name=name),
    )


def german_appointment(rng: random.Random) -> Example:
    day, hour, name = rng.choice(DAYS), rng.randrange(len(GERMAN_NUMBERS)), rng.choice(NAMES)
    return Example(
        german_request(rng, f"{name} comes on {day} at {ENGLISH_NUMBERS[hour]} o'clock."),
        f"{name} kommt am {GERMAN_DAYS[day]} um {GERMAN_NUMBERS[hour]} Uhr.",
    )


FAMILIES: dict[str, tuple[Family, ...]] = {
    "arithmetic": (addition, subtraction, multiplication, purchase_total),
    "python": (list_function, list_slice, list_filter, text_method),
    "extraction": (purchase_record, trip_record, meeting_record),
    "german": (german_introduction, german_order, german_thing, german_appointment),
}
SKILLS = tuple(FAMILIES)


def skill_examples(
    skill: str, split: Literal["train", "test"], count: int, seed: int, families: Sequence[Family] | None = None
) -> list[Example]:
    """`count` different questions of one skill and split, of all its families or of those given.

    The same arguments give the same list.
    """

    def draw(rng: random.Random) -> Example:
        example = rng.choice(families or FAMILIES[skill])(rng)
        return Example(rng.choice(LEAD_INS) + example.prompt, example.completion)

    return draw_examples(draw, split, count, f"real/{skill}/{split}/{seed}")
