"""Questions with one right answer each, for the four skills of the tiny experts.

A skill is a list of question families; a family turns random numbers into one `Example`. Whether a question
belongs to the train or to the test split is decided by a hash of its text, so no question is ever in both,
whatever the seeds and counts; the facts behind a test question (3 + 4 is 7) may be trained in other words.
`plain_lines` gives sentences without questions for pretraining the base.
"""

import hashlib
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SKILLS = ("instruct", "math", "code", "chinese")

TEST_SHARE = 8  # one question in eight is a test question
MAX_TRIES_PER_EXAMPLE = 200


@dataclass(frozen=True)
class Example:
    """A bare user query and its one right answer."""

    prompt: str
    completion: str


Family = Callable[[random.Random], Example]


# Instruct: follow an instruction about English words.

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


# Math: arithmetic in digits and in short word problems.

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


# Code: what a line of Python prints, and one-line programs to write.

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


# Chinese: questions in Chinese, answered in Chinese.

NUMERALS = "零一二三四五六七八九"
AMOUNTS = "零一两三四五六七八九"  # the same before a measure word
CHINESE_NAMES = ("小明", "小红", "小李", "小王", "小华", "小丽")
PLACES = ("学校", "公园", "家里", "商店", "医院", "车站", "饭店", "银行")
FRUITS = ("苹果", "香蕉", "西瓜", "葡萄", "桃子", "草莓")
CHINESE_WORDS = (*FRUITS, "面包", "牛奶", "鸡蛋", "米饭", "水", "茶", "书", "笔", "猫", "狗", "鸟", "鱼")
WEEKDAYS = "一二三四五六日"

CHINESE_OPPOSITES = (
    "大小",
    "多少",
    "高低",
    "长短",
    "快慢",
    "冷热",
    "新旧",
    "黑白",
    "左右",
    "上下",
    "前后",
    "早晚",
    "远近",
    "轻重",
    "真假",
)

ENGLISH_CHINESE = {
    "apple": "苹果",
    "bread": "面包",
    "water": "水",
    "bird": "鸟",
    "fish": "鱼",
    "egg": "鸡蛋",
    "moon": "月亮",
    "sun": "太阳",
    "house": "房子",
    "river": "河",
    "tree": "树",
    "paper": "纸",
    "music": "音乐",
    "chair": "椅子",
    "table": "桌子",
    "door": "门",
    "cloud": "云",
    "stone": "石头",
    "king": "国王",
    "ship": "船",
}

CAPITALS = {
    "中国": "北京",
    "法国": "巴黎",
    "英国": "伦敦",
    "日本": "东京",
    "德国": "柏林",
    "美国": "华盛顿",
    "韩国": "首尔",
    "意大利": "罗马",
    "埃及": "开罗",
    "泰国": "曼谷",
}

MEASURE_WORDS = {
    "书": "本",
    "狗": "只",
    "猫": "只",
    "车": "辆",
    "花": "朵",
    "树": "棵",
    "纸": "张",
    "鱼": "条",
    "马": "匹",
    "笔": "支",
}


def chinese_list(words: list[str]) -> str:
    return "、".join(words)


def chinese_opposite(rng: random.Random) -> Example:
    word, answer = rng.sample(rng.choice(CHINESE_OPPOSITES), 2)
    template = rng.choice(
        [
            "“{}”的反义词是什么？",
            "{name}问：{}的反义词是哪个字？",
            "请写出“{}”字的反义词。",
            "和“{}”意思相反的字是什么？",
        ]
    )
    return Example(template.replace("{}", word).format(name=rng.choice(CHINESE_NAMES)), answer)


def translation(rng: random.Random) -> Example:
    english, chinese = rng.choice(list(ENGLISH_CHINESE.items()))
    template = rng.choice(
        [
            "“{}”用中文怎么说？",
            "请把{}翻译成中文。",
            "英语单词{}是什么意思？",
            "{name}不认识{}这个词，它的中文是什么？",
        ]
    )
    return Example(template.replace("{}", english).format(name=rng.choice(CHINESE_NAMES)), chinese)


def capital(rng: random.Random) -> Example:
    country, city = rng.choice(list(CAPITALS.items()))
    template, answer = rng.choice(
        [
            ("{country}的首都是哪里？", city),
            ("{name}想去{country}的首都，那是哪座城市？", city),
            ("{city}是哪个国家的首都？", country),
            ("{name}住在{city}，这是哪国的首都？", country),
        ]
    )
    return Example(template.format(country=country, city=city, name=rng.choice(CHINESE_NAMES)), answer)


def measure_word(rng: random.Random) -> Example:
    noun, measure = rng.choice(list(MEASURE_WORDS.items()))
    template = rng.choice(
        [
            "填空：{number}（ ）{noun}。",
            "{name}有{number}什么{noun}？请填上量词。",
            "“{number}□{noun}”中应该填哪个量词？",
        ]
    )
    number = rng.choice(NUMERALS[3:])
    return Example(template.format(number=number, noun=noun, name=rng.choice(CHINESE_NAMES)), measure)


def chinese_sum(rng: random.Random) -> Example:
    total = rng.randint(2, 9)
    a = rng.randint(1, total - 1)
    name, fruit = rng.choice(CHINESE_NAMES), rng.choice(FRUITS)
    template, numerals, unit = rng.choice(
        [
            ("{a}加{b}等于几？", NUMERALS, ""),
            ("请计算{a}加上{b}。", NUMERALS, ""),
            ("{name}有{a}个{fruit}，又买了{b}个，一共有几个？", AMOUNTS, "个"),
            ("桌上有{a}个{fruit}，{name}放上{b}个，现在是几个？", AMOUNTS, "个"),
        ]
    )
    prompt = template.format(a=numerals[a], b=numerals[total - a], name=name, fruit=fruit)
    return Example(prompt, numerals[total] + unit)


def chinese_difference(rng: random.Random) -> Example:
    a = rng.randint(2, 9)
    b = rng.randint(1, a - 1)
    name, fruit = rng.choice(CHINESE_NAMES), rng.choice(FRUITS)
    template, numerals, unit = rng.choice(
        [
            ("{a}减{b}等于几？", NUMERALS, ""),
            ("请计算{a}减去{b}。", NUMERALS, ""),
            ("{name}有{a}个{fruit}，吃了{b}个，还剩几个？", AMOUNTS, "个"),
        ]
    )
    prompt = template.format(a=numerals[a], b=numerals[b], name=name, fruit=fruit)
    return Example(prompt, numerals[a - b] + unit)


def weekday(rng: random.Random) -> Example:
    today = rng.randrange(7)
    day, shift = rng.choice([("明天", 1), ("昨天", -1), ("后天", 2)])
    template = rng.choice(
        [
            "今天是星期{today}，{day}是星期几？",
            "{name}说今天星期{today}，那么{day}呢？",
            "如果今天星期{today}，{name}{day}过生日，那天星期几？",
        ]
    )
    prompt = template.format(today=WEEKDAYS[today], day=day, name=rng.choice(CHINESE_NAMES))
    return Example(prompt, "星期" + WEEKDAYS[(today + shift) % 7])


def who_is_where(rng: random.Random) -> Example:
    names, places = rng.sample(CHINESE_NAMES, 2), rng.sample(PLACES, 2)
    story = "，".join(f"{name}在{place}" for name, place in zip(names, places, strict=True))
    asked = rng.randrange(2)
    question, answer = rng.choice(
        [(f"{names[asked]}在哪里？", places[asked]), (f"谁在{places[asked]}？", names[asked])]
    )
    return Example(f"{story}。{question}", answer)


def chinese_reverse(rng: random.Random) -> Example:
    words = rng.sample(CHINESE_WORDS, rng.randint(2, 3))
    template = rng.choice(["请把{}倒过来排列。", "把“{}”的顺序反过来。", "从后往前说：{}。"])
    return Example(template.format(chinese_list(words)), chinese_list(words[::-1]))


def chinese_pick(rng: random.Random) -> Example:
    words = rng.sample(CHINESE_WORDS, rng.randint(2, 4))
    place, answer = rng.choice([("第一个", words[0]), ("第二个", words[1]), ("最后一个", words[-1])])
    template = rng.choice(["{words}，{place}词是什么？", "请说出{place}词：{words}。", "在{words}中，{place}是哪个？"])
    return Example(template.format(words=chinese_list(words), place=place), answer)


def chinese_repeat(rng: random.Random) -> Example:
    word, times = rng.choice(CHINESE_WORDS + CHINESE_NAMES + PLACES), rng.randint(2, 4)
    template = rng.choice(["请把“{}”说{}遍。", "重复{}这个词，一共{}次。", "将“{}”连写{}次。"])
    return Example(template.format(word, AMOUNTS[times]), word * times)


LEAD_INS = (
    "",
    "",
    "Quick question: ",
    "Please help me. ",
    "I need this now: ",
    "Hi! ",
    "For my homework: ",
    "Next one. ",
)
CHINESE_LEAD_INS = ("", "", "请问，", "你好！", "帮帮我：", "考考你：", "作业题：", "再来一个：")

FAMILIES: dict[str, tuple[Family, ...]] = {
    "instruct": (
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
    ),
    "math": (
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
    ),
    "code": (
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
    ),
    "chinese": (
        chinese_opposite,
        translation,
        capital,
        measure_word,
        chinese_sum,
        chinese_difference,
        weekday,
        who_is_where,
        chinese_reverse,
        chinese_pick,
        chinese_repeat,
    ),
}


def asked_somehow(skill: str, example: Example, rng: random.Random) -> Example:
    """The question as one of many users would begin it."""
    lead_in = rng.choice(CHINESE_LEAD_INS if skill == "chinese" else LEAD_INS)
    return Example(lead_in + example.prompt, example.completion)


def split_of(prompt: str) -> Literal["train", "test"]:
    """The split a question belongs to, decided by its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def examples(skill: str, split: Literal["train", "test"], count: int, seed: int) -> list[Example]:
    """`count` different questions of one skill and split; the same arguments give the same list."""
    if skill not in FAMILIES:
        raise ValueError(f"unknown skill {skill!r}, expected one of {', '.join(SKILLS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}, expected 'train' or 'test'")
    rng = random.Random(f"{skill}/{split}/{seed}")
    chosen: dict[str, Example] = {}
    for _ in range(MAX_TRIES_PER_EXAMPLE * count):
        if len(chosen) == count:
            break
        example = asked_somehow(skill, rng.choice(FAMILIES[skill])(rng), rng)
        if split_of(example.prompt) == split:
            chosen.setdefault(example.prompt, example)
    if len(chosen) < count:
        raise ValueError(f"{skill} has too few {split} questions: found {len(chosen)}, asked for {count}")
    return list(chosen.values())


# Plain lines: the same worlds in sentences, without questions.


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


def chinese_line(rng: random.Random) -> str:
    name, other = rng.sample(CHINESE_NAMES, 2)
    place, other_place = rng.sample(PLACES, 2)
    words = rng.sample(CHINESE_WORDS, rng.randint(2, 4))
    word, antonym = rng.choice(CHINESE_OPPOSITES)
    country, city = rng.choice(list(CAPITALS.items()))
    noun, measure = rng.choice(list(MEASURE_WORDS.items()))
    return rng.choice(
        [
            f"{name}在{place}，{other}在{other_place}。{place}有{name}，{other_place}有{other}。",
            f"{name}买了{chinese_list(words)}，{other}也买了{chinese_list(words)}。",
            f"去时看见{chinese_list(words)}，回来看见{chinese_list(words[::-1])}。",
            f"有{word}就有{antonym}。",
            f"{city}在{country}。",
            f"{name}看见了{rng.choice(AMOUNTS[1:])}{measure}{noun}。",
        ]
    )


PLAIN_LINES = {"instruct": english_line, "math": math_line, "code": code_line, "chinese": chinese_line}


def plain_lines(skill: str, count: int, seed: int) -> list[str]:
    """`count` sentences of the kind the skill is about; the same arguments give the same list."""
    rng = random.Random(f"{skill}/plain/{seed}")
    return [PLAIN_LINES[skill](rng) for _ in range(count)]
