"""What lines of Python print, and one-line programs to write."""

import operator
import random

from tiny_experts.english_skill import WORDS
from tiny_experts.example import Example, Family

VARIABLES = ("x", "y", "n", "total", "count", "size", "score", "price", "value", "items", "data", "names", "rows")
FUNCTIONS = ("f", "g", "shift", "scale", "step", "update")
MODULES = ("math", "os", "sys", "json", "re", "time", "random", "csv")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
COMPARISONS = {"==": operator.eq, "<": operator.lt, ">": operator.gt, "!=": operator.ne}


def prints(rng: random.Random, program: str, output: object) -> Example:
    template = rng.choice(
        [
            "What does this print?\n{}",
            "What is the output of {}",
            "Predict the output: {}",
            "I run this Python code, what is shown?\n{}",
            "{}\nWhat will Python print?",
        ]
    )
    return Example(template.format(program), str(output))


def print_arithmetic(rng: random.Random) -> Example:
    symbol, a, b = rng.choice(list(OPERATORS)), rng.randint(1, 9), rng.randint(1, 9)
    answer = OPERATORS[symbol](a, b)
    name = rng.choice(VARIABLES)
    program = rng.choice([f"print({a} {symbol} {b})", f"{name} = {a}\nprint({name} {symbol} {b})"])
    return prints(rng, program, answer)


def print_comparison(rng: random.Random) -> Example:
    symbol, a, b = rng.choice(list(COMPARISONS)), rng.randint(0, 9), rng.randint(0, 9)
    return prints(rng, f"print({a} {symbol} {b})", COMPARISONS[symbol](a, b))


def digits(rng: random.Random, least: int, most: int) -> list[int]:
    return rng.sample(range(1, 9), rng.randint(least, most))


def print_list_item(rng: random.Random) -> Example:
    numbers = digits(rng, 2, 4)
    index = rng.choice([-1, *range(len(numbers))])
    name = rng.choice(VARIABLES)
    program = rng.choice([f"print({numbers}[{index}])", f"{name} = {numbers}\nprint({name}[{index}])"])
    return prints(rng, program, numbers[index])


def print_list_function(rng: random.Random) -> Example:
    numbers = digits(rng, 2, 3)
    function = rng.choice([len, min, max, sorted])
    return prints(rng, f"print({function.__name__}({numbers}))", function(numbers))


def print_list_concatenation(rng: random.Random) -> Example:
    left, right = digits(rng, 1, 2), digits(rng, 1, 2)
    return prints(rng, f"print({left} + {right})", left + right)


def print_list_repetition(rng: random.Random) -> Example:
    number, times = rng.randint(0, 99), rng.randint(2, 4)
    return prints(rng, f"print([{number}] * {times})", [number] * times)


def print_range(rng: random.Random) -> Example:
    start, length = rng.randint(0, 5), rng.randint(1, 5)
    arguments = f"{start}, {start + length}" if start else f"{length}"
    return prints(rng, f"print(list(range({arguments})))", list(range(start, start + length)))


def print_string_method(rng: random.Random) -> Example:
    word = rng.choice(WORDS)
    method, argument, answer = rng.choice(
        [
            ("upper", word, word.upper()),
            ("lower", word.upper(), word),
            ("title", word, word.title()),
        ]
    )
    return prints(rng, f'print("{argument}".{method}())', answer)


def print_string_length(rng: random.Random) -> Example:
    word, name = rng.choice(WORDS), rng.choice(VARIABLES)
    program = rng.choice([f'print(len("{word}"))', f'{name} = "{word}"\nprint(len({name}))'])
    return prints(rng, program, len(word))


def print_two_words(rng: random.Random) -> Example:
    first, second = rng.sample(WORDS, 2)
    return prints(rng, f'print("{first}", "{second}")', f"{first} {second}")


def write_program(rng: random.Random) -> Example:
    """One task in words, one line of Python as the answer."""
    name, other = rng.sample(VARIABLES, 2)
    number, function, module = rng.randint(0, 99), rng.choice(FUNCTIONS), rng.choice(MODULES)
    task, program = rng.choice(
        [
            (f"set {name} to {number}", f"{name} = {number}"),
            (f"copy {other} into {name}", f"{name} = {other}"),
            (f"append {number} to the list {name}", f"{name}.append({number})"),
            (f"print the length of {name}", f"print(len({name}))"),
            (f"print {name} and then {other}", f"print({name}, {other})"),
            (f"import {name} from the module {module}", f"from {module} import {name}"),
            (f"import the module {module} as {name}", f"import {module} as {name}"),
            (f"loop over {name} with the variable {other}", f"for {other} in {name}:"),
            (f"increase {name} by {number} in place", f"{name} += {number}"),
            (f"delete the variable {name}", f"del {name}"),
            (f"start an if when {name} is greater than {number}", f"if {name} > {number}:"),
            (f"start a while loop that runs until {name} is {number}", f"while {name} != {number}:"),
            (f"take the last element of {name}", f"{name}[-1]"),
            (f"take the first {number} elements of {name}", f"{name}[:{number}]"),
            (f"define {function} that adds {number} to {name}", f"def {function}({name}): return {name} + {number}"),
            (f"swap {name} and {other}", f"{name}, {other} = {other}, {name}"),
        ]
    )
    template = rng.choice(
        [
            "Write Python: {}.",
            "How do I {} in Python?",
            "One line of Python, please: {}.",
            "Show me the code to {}.",
            "Give the Python statement to {}.",
        ]
    )
    return Example(template.format(task), program)


CODE_FAMILIES: tuple[Family, ...] = (
    print_arithmetic,
    print_comparison,
    print_list_item,
    print_list_function,
    print_list_concatenation,
    print_list_repetition,
    print_range,
    print_string_method,
    print_string_length,
    print_two_words,
    write_program,
    write_program,
    write_program,
)


def code_line(rng: random.Random) -> str:
    name, other = rng.sample(VARIABLES, 2)
    number, word = rng.randint(0, 99), rng.choice(WORDS)
    numbers = digits(rng, 2, 5)
    return rng.choice(
        [
            f"{name} = {number}\nprint({name})  # {number}",
            f"{name} = {numbers}\nprint({name})  # {numbers}\nprint({name}[0])  # {numbers[0]}",
            f"{other} = {numbers}\nlen({other}) == {len(numbers)}\nmax({other}) == {max(numbers)}",
            f"for {other} in {name}:\n    print({other})",
            f'{name} = "{word}"\nassert {name}.upper() == "{word.upper()}"',
            f"def {rng.choice(FUNCTIONS)}({name}): return {name} + {number}",
            f"import {rng.choice(MODULES)}\n{name}.append({other})",
        ]
    )
