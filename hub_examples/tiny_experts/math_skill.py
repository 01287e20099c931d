"""Arithmetic in digits and in short word problems."""

import random

from tiny_experts.example import Example, Family

NAMES = ("Tom", "Anna", "Sam", "Lucy", "Ben", "Mia", "Jack", "Emma")
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "stamps", "balls")


def addition(rng: random.Random) -> Example:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    template = rng.choice(
        ["What is {} + {}?", "{} + {} = ?", "Calculate {} plus {}.", "Find the sum of {} and {}.", "Add {} and {}."]
    )
    return Example(template.format(a, b), str(a + b))


def subtraction(rng: random.Random) -> Example:
    b, difference = rng.randint(1, 9), rng.randint(0, 9)
    template = rng.choice(
        [
            "What is {a} - {b}?",
            "{a} - {b} = ?",
            "Calculate {a} minus {b}.",
            "Subtract {b} from {a}.",
            "How much larger is {a} than {b}?",
        ]
    )
    return Example(template.format(a=b + difference, b=b), str(difference))


def multiplication(rng: random.Random) -> Example:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    template = rng.choice(
        [
            "What is {} * {}?",
            "{} x {} = ?",
            "Calculate {} times {}.",
            "Find the product of {} and {}.",
            "Multiply {} by {}.",
            "What number is {} times as large as {}?",
        ]
    )
    return Example(template.format(a, b), str(a * b))


def division(rng: random.Random) -> Example:
    divisor, quotient = rng.randint(2, 9), rng.randint(2, 9)
    template = rng.choice(
        [
            "What is {} / {}?",
            "Divide {} by {}.",
            "Calculate {} divided by {}.",
            "{} things are shared by {} people. How many does each one get?",
        ]
    )
    return Example(template.format(divisor * quotient, divisor), str(quotient))


def double_or_half(rng: random.Random) -> Example:
    half = rng.randint(1, 20)
    small, large = str(half), str(2 * half)
    template, number, answer = rng.choice(
        [
            ("What is twice {}?", small, large),
            ("Double the number {}.", small, large),
            ("What is half of {}?", large, small),
            ("Find one half of the number {}.", large, small),
        ]
    )
    return Example(template.format(number), answer)


def word_addition(rng: random.Random) -> Example:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    template = rng.choice(
        [
            "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
            "{name} has {a} {thing}. {friend} has {b} {thing}. How many do they have together?",
            "There are {a} {thing} in a box. {name} adds {b}. How many are there?",
        ]
    )
    return Example(template.format(name=name, friend=friend, thing=thing, a=a, b=b), str(a + b))


def word_subtraction(rng: random.Random) -> Example:
    b, left = rng.randint(2, 9), rng.randint(1, 9)
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    template = rng.choice(
        [
            "{name} has {a} {thing} and gives {b} to {friend}. How many {thing} are left?",
            "{name} had {a} {thing} but lost {b}. How many does {name} still have?",
            "From {a} {thing}, {name} sells {b}. How many remain?",
        ]
    )
    return Example(template.format(name=name, friend=friend, thing=thing, a=b + left, b=b), str(left))


def word_multiplication(rng: random.Random) -> Example:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    template = rng.choice(
        [
            "{name} has {a} bags with {b} {thing} each. How many {thing} is that?",
            "Every day {name} finds {b} {thing}. How many after {a} days?",
            "A box holds {b} {thing}. How many {thing} are in {a} boxes?",
        ]
    )
    return Example(template.format(name=name, thing=thing, a=a, b=b), str(a * b))


def compare_numbers(rng: random.Random) -> Example:
    a, b = rng.sample(range(1, 20), 2)
    template, choose = rng.choice(
        [
            ("Which number is larger, {} or {}?", max),
            ("Which is smaller: {} or {}?", min),
            ("Give the greater of {} and {}.", max),
            ("Name the lesser of the two numbers {} and {}.", min),
        ]
    )
    return Example(template.format(a, b), str(choose(a, b)))


def next_in_sequence(rng: random.Random) -> Example:
    start, step = rng.randint(1, 12), rng.randint(1, 4)
    first, second, third, answer = (start + i * step for i in range(4))
    template = rng.choice(
        [
            "What number comes next: {}, {}, {}?",
            "Continue the sequence {}, {}, {} with one number.",
            "{}, {}, {}, ... what follows?",
        ]
    )
    return Example(template.format(first, second, third), str(answer))


def parity(rng: random.Random) -> Example:
    number = rng.randint(1, 99)
    template = rng.choice(["Is {} even or odd?", "Tell me if the number {} is odd or even.", "{}: odd or even?"])
    return Example(template.format(number), "odd" if number % 2 else "even")


MATH_FAMILIES: tuple[Family, ...] = (
    addition,
    subtraction,
    multiplication,
    division,
    double_or_half,
    word_addition,
    word_subtraction,
    word_multiplication,
    compare_numbers,
    next_in_sequence,
    parity,
)


def math_line(rng: random.Random) -> str:
    a, b, c = rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 4)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return rng.choice(
        [
            f"{a} + {b} = {a + b}, {a + b} - {b} = {a}",
            f"{a} * {b} = {a * b}, {a * b} / {b} = {a}",
            f"Half of {2 * a} is {a}, twice {a} is {2 * a}.",
            f"{name} has {a} {thing} and finds {b} {thing}: {a + b} in all.",
            f"{a}, {a + c}, {a + 2 * c}, {a + 3 * c}",
            f"{a + c} is larger and {a} is smaller. {2 * a} is even, {2 * b + 1} is odd.",
        ]
    )
