# ruff: noqa: E501 (a template is read best on one line)
"""Router queries in styles that one data set does not show: competition LaTeX, many programming languages, exams.

    python hub_examples/style_queries.py my-coder=code my-teacher=math --count 1000 --output-file generated.jsonl
    channel-merge train-router merged --train-data code.jsonl math.jsonl generated.jsonl --output-dir routed

You say of which kind an expert is: instruct, math, code or chinese. The file is ordinary router data; its rows are
marked as `generated`, so that none of them is held out to evaluate. All sentences are made here from the templates
below; the same arguments give the same queries. A thousand for each expert are enough, and not more than three times
its own queries.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

# Shared

PEOPLE = "Ana Ben Chloe Deepak Elena Farid Grace Hugo Ines Jonas Kofi Lena Marco Nadia Oscar Priya Ravi Sofia".split()
ITEMS = "apples books candles coins cookies eggs flowers marbles pencils shirts stamps stickers tickets".split()


def pick(rng: random.Random, *choices: str) -> str:
    return rng.choice(choices)


# Mathematics

VARIABLES = "x y z n k a b m t".split()
GREEK = r"\alpha \beta \theta \lambda \pi \omega".split()


def term(rng: random.Random) -> str:
    """A small LaTeX expression."""
    v, w, a, b = rng.choice(VARIABLES), rng.choice(VARIABLES), rng.randint(2, 30), rng.randint(2, 12)
    return pick(
        rng,
        f"{a}{v}^{b}",
        f"{v}^2 {pick(rng, '+', '-')} {a}{v} {pick(rng, '+', '-')} {b}",
        rf"\frac{{{a}}}{{{b}}}",
        rf"\frac{{{v}+{a}}}{{{v}-{b}}}",
        rf"\dfrac{{{a}{v}}}{{{b}}}",
        rf"\sqrt{{{a}{v}+{b}}}",
        rf"\sqrt[{pick(rng, '3', '4')}]{{{a}}}",
        rf"\log_{{{b}}} {a}",
        rf"\{pick(rng, 'sin', 'cos', 'tan')} {pick(rng, v, rng.choice(GREEK), f'{a}^' + chr(92) + 'circ')}",
        rf"\binom{{{a}}}{{{b}}}",
        rf"{a} \cdot {b} {pick(rng, '+', '-')} {v}",
        rf"\left( {v} + \frac{{1}}{{{v}}} \right)^{b}",
        rf"|{v} - {a}|",
        rf"{a}! \div {b}!",
        rf"\lfloor {v} \rfloor",
        rf"{v}_{{{a}}}",
        rf"e^{{{a}{v}}}",
        rf"{v}{w} - {a}",
        rf"(-{a}, {b})",
        rf"\overline{{{rng.choice('ABCDPQ')}{rng.choice('EFGHMN')}}}",
    )


def inline(rng: random.Random, text: str) -> str:
    return pick(rng, f"${text}$", f"${text}$", f"${text}$", rf"\({text}\)")


def formula(rng: random.Random) -> str:
    """An expression, inline or on its own line."""
    text = term(rng) if rng.random() < 0.5 else f"{term(rng)} {pick(rng, '+', '-', '=')} {term(rng)}"
    return pick(rng, inline(rng, text), inline(rng, text), rf"\[{text}\]", f"$${text}$$")


def latex_problem(rng: random.Random) -> str:
    v, w = rng.sample(VARIABLES, 2)
    a, b, c, n = rng.randint(2, 20), rng.randint(2, 50), rng.randint(2, 9), rng.randint(10, 2030)
    t, f = inline(rng, term(rng)), formula(rng)
    triangle = "".join(rng.sample("ABCDEFPQRXYZ", 3))
    kind = pick(rng, "positive", "nonnegative", "odd", "even", "prime", "three-digit", "distinct")
    end = pick(
        rng,
        "",
        "",
        "",
        " Express your answer as a common fraction.",
        r" Express your answer in terms of $\pi$.",
        " Give your answer in simplest radical form.",
        " Round to the nearest tenth.",
    )
    matrix = rf"\begin{{pmatrix}} {a} & {c} \\ {b} & -{a} \end{{pmatrix}}"
    text = rng.choice(
        [
            f"Simplify {f}",
            f"Evaluate {f}",
            f"Compute {f}",
            f"Calculate the value of {f}",
            f"Solve for ${v}$: {f}",
            f"Find all real solutions of the equation {f}",
            f"Find the sum of the roots of {f}",
            f"Factor {f} completely.",
            f"What is the value of {t} when ${v} = {a}$?",
            f"If {t} $= {b}$, what is ${v}$?",
            f"Let $f({v}) = {term(rng)}$. Find $f({a})$.",
            rf"For which integers ${v}$ is {t} a multiple of ${c}$?",
            f"How many {kind} integers ${v}$ satisfy {f}?",
            rf"What is the remainder when ${a}^{{{n}}}$ is divided by ${b}$?",
            f"Find the largest {kind} divisor of ${n}$.",
            rf"Let ${v}$ and ${w}$ be real numbers such that {f} Determine the minimum of ${v}^2 + {w}^2$.",
            rf"Triangle ${triangle}$ has a right angle at ${triangle[1]}$. If ${triangle[:2]} = {a}$ and "
            rf"${triangle[1:]} = {b}$, what is $\{pick(rng, 'sin', 'cos', 'tan')} {triangle[0]}$?",
            rf"In $\triangle {triangle}$, $\angle {triangle[0]} = {b}^\circ$. Find the area of the triangle.",
            f"A circle of radius ${a}$ is tangent to the line $y = {c}$. What is the distance between its center and "
            "the origin?",
            rf"The polynomial $p({v}) = {v}^3 - {a}{v} + {b}$ has roots $r$, $s$ and $t$. Compute $r^{c} + s^{c} + t^{c}$.",
            rf"Prove that {t} is divisible by ${c}$ for every {kind} integer ${v}$.",
            rf"Show that {f} holds for all ${v} > {a}$.",
            rf"Find the sum \[\sum_{{{v}=1}}^{{{n}}} {term(rng)}.\]",
            rf"Evaluate $\int_{{0}}^{{{a}}} {term(rng)} \, d{v}$.",
            rf"Compute $\lim_{{{v} \to {a}}} {term(rng)}$.",
            rf"Find the derivative of $g({v}) = {term(rng)}$.",
            rf"Let $\mathbf{{A}} = {matrix}$. Find $\det \mathbf{{A}}$.",
            rf"Compute the inverse of ${matrix}$.",
            rf"The sequence $a_1, a_2, \ldots$ satisfies $a_1 = {a}$ and $a_{{n+1}} = {c}a_n + {b}$. Find $a_{{{a}}}$.",
            f"A fair {pick(rng, 'die', 'coin')} is thrown ${a}$ times. What is the probability that exactly ${c}$ of "
            "the throws agree?",
            f"In how many ways can ${a}$ {pick(rng, 'students', 'books', 'beads', 'letters')} be arranged so that no "
            f"two of ${c}$ chosen ones are adjacent?",
            f"The line through $({a}, -{b})$ and $(-{c}, {a})$ has which slope?",
            rf"What is the degree measure of the angle whose sine equals ${term(rng)}$?",
            rf"Convert ${n}_{{10}}$ to base ${c}$.",
            rf"Find the domain of the function ${v} \mapsto {term(rng)}$.",
            f"The points $P$ and $Q$ divide a segment of length ${b}$ in the ratio ${a} : {c}$. What is $PQ$?",
            rf"Let $S = \{{1, 2, \ldots, {n}\}}$. How many subsets of $S$ contain no {kind} element?",
            rf"Suppose that {t} and {inline(rng, term(rng))} are both {kind} integers. What is the smallest possible "
            f"value of ${v} + {w}$?",
            rf"A sphere has volume ${a}\pi$. What is its surface area?",
            rf"Find the magnitude of the complex number ${a} - {b}i$.",
        ]
    )
    return text + end


def plain_problem(rng: random.Random) -> str:
    a, b, c, n = rng.randint(2, 20), rng.randint(2, 60), rng.randint(2, 9), rng.randint(100, 2000)
    x = pick(rng, "x", "y", "n", "t")
    name, other = rng.sample(PEOPLE, 2)
    item, thing = rng.sample(ITEMS, 2)
    shape = pick(rng, "square", "circle", "cube", "rhombus", "cylinder", "regular hexagon", "trapezoid", "sphere")
    quantity = pick(rng, "area", "perimeter", "volume", "diagonal", "surface area", "radius", "height")
    choices = " ".join(f"{letter}) {number}" for letter, number in zip("ABCD", rng.sample(range(2, 99), 4)))
    text = rng.choice(
        [
            f"What is {a} {pick(rng, 'times', 'plus', 'minus', 'divided by')} {b}?",
            f"Calculate {n} - {b} * ({a} + {c}).",
            f"Work out {a}% of {n}.",
            f"Solve {a}{x} + {b} = {n}.",
            f"Solve the equation {a}({x} - {c}) = {b}{x}.",
            f"Find {x} if {x}/{c} - {a} = {b}.",
            f"Simplify {a}{x}^2 * {c}{x}^3.",
            f"Expand ({x} + {a})({x} - {c}).",
            f"Factorise {x}^2 + {a + c}{x} + {a * c}.",
            f"What is the {quantity} of a {shape} whose side measures {a} cm?",
            f"The {quantity} of a {shape} is {b}. Find its {pick(rng, 'side', 'diameter', 'edge', 'base')}.",
            f"The sum of {c} consecutive integers is {n}. What is the smallest of them?",
            f"What is the least common multiple of {a} and {b}?",
            f"Is {n} divisible by {c}?",
            f"Differentiate {a}{x}^{c} + sin({x}).",
            f"Integrate {x}^{c} from 0 to {a}.",
            f"Find the limit of ({x}^2 - {a}) / ({x} + {c}) as {x} approaches infinity.",
            f"What is the probability of rolling a {c} twice with a fair die?",
            f"How many ways are there to choose {c} people from a group of {a + 9}?",
            f"If f({x}) = {a}{x} - {c}, what is f({b})?",
            f"The mean of {c} numbers is {b}. What is their total?",
            f"Find the median of {a}, {b}, {c}, {a + 4}, {b + 7}.",
            f"A car travels {n} km in {c} hours. What is its average speed in km/h?",
            f"{name} can paint a wall in {a} hours and {other} in {b} hours. How long do they need together?",
            f"A merchant buys {item} for {b} and sells them for {b + c}. What is the profit in percent?",
            f"The price of {n} dollars falls by {a}% and then rises by {c}%. What is the final price?",
            f"The ratio of {item} to {thing} is {a}:{c}. If there are {n} in all, how many {item} are there?",
            f"There are {n} {item} in {a} boxes. How many {item} are in each box?",
            f"{name} had {b} {item}. After giving some to {other}, {c} are left. How many did {other} get?",
            f"{name} is {c} times as old as {other}. In {a} years their ages add up to {b}. How old is {other}?",
            f"At what simple interest rate do {n} dollars grow to {n + b} in {c} years?",
            f"A tank holds {n} litres and leaks {c} litres an hour. When is it half empty?",
            f"Prove that the product of {c} consecutive integers is even.",
            f"Write {a}/{b + 1} as a {pick(rng, 'decimal', 'percentage', 'fraction in lowest terms', 'mixed number')}.",
            f"Convert 0.{b} to {pick(rng, 'a fraction', 'a percentage', 'binary')}.",
            f"Evaluate {a}! / {c}!.",
            f"Evaluate {c}^{c} - {a}.",
            f"What is log base {c} of {n}?",
            f"What is the value of cos({b} degrees)?",
            f"Find the {quantity} of a circle whose circumference is {a} pi.",
            f"Find the roots of {x}^2 - {a}{x} + {b} = 0.",
            f"Find the hypotenuse of a right triangle with legs {a} and {c}.",
            f"Let g({x}) = {x}^2 + {a}. For which {x} is g({x}) = {n}?",
            f"If {a} machines make {n} {item} in {c} days, how many days do {b} machines need?",
            f"Show that the sum of two {pick(rng, 'even', 'odd', 'rational')} numbers is {pick(rng, 'even', 'rational')}.",
            f"Round {n}.{b}{c} to one decimal place.",
            f"What is the next number in the sequence {c}, {c * 2}, {c * 4}, {c * 8}?",
            f"Find the slope of the line {a}{x} - {c}y = {b}.",
            f"Two angles of a triangle measure {a + 20} and {b + 30} degrees. What is the third?",
            f"Solve the inequality {a}{x} - {b} < {c}.",
            f"What is the determinant of [[{a}, {b}], [{c}, {a}]]?",
        ]
    )
    return f"{text} {pick(rng, 'Choices:', 'Options:', 'Answer choices:')} {choices}" if rng.random() < 0.12 else text


# Programming

LANGUAGES = (
    "Python Java JavaScript TypeScript C C++ C# Go Rust Ruby PHP Kotlin Swift Scala Haskell R Perl Lua Julia MATLAB "
    "Dart Bash PowerShell SQL VBA Fortran Elixir Clojure Python Java JavaScript C++"
).split()
TASKS = (
    "sort an array of integers|reverse a string|count the words in a text file|parse a CSV file|merge two sorted lists|"
    "check whether a number is prime|find duplicates in a list|validate user input|read JSON from a URL|flatten a list|"
    "connect to a database|compute the factorial of n|remove empty lines from a file|find the longest common prefix|"
    "traverse a binary tree|implement a queue|implement depth-first search|convert Celsius to Fahrenheit|format a date|"
    "generate a random password|send an HTTP request|resize an image|schedule a job|compress a folder|upload a file|"
    "rotate a matrix by 90 degrees|find the shortest path in a graph|debounce an input handler|hash a password|"
    "invert a dictionary|split a list into chunks|measure the run time of a function|walk a directory tree|"
    "implement a hash map|detect a cycle in a linked list|check for balanced parentheses|multiply two matrices|"
    "start several threads and wait for them|copy an object deeply|iterate over the rows of a table|log to a file|"
    "download a page and extract its links|render a list of cards|read environment variables|catch an exception|"
    "count how often each character occurs in a string|print the Fibonacci sequence|find the maximum of an array|"
    "sum the elements of an integer array|concatenate strings with a separator|encode a string in base64"
).split("|")
NOUNS = (
    "user order product invoice node token message account item price score record event file session label".split()
)
TYPES = "int|str|float|bool|List[int]|List[str]|dict|Optional[int]|Tuple[int, int]|np.ndarray|Callable".split("|")
VERBS = (
    "get find count remove merge parse filter compute update load check split is build sort make sum max to".split()
)
ERRORS = (
    "NullPointerException|IndexError: list index out of range|undefined is not a function|AttributeError|"
    "segmentation fault (core dumped)|TypeError: unsupported operand type(s)|cannot borrow as mutable|"
    "ModuleNotFoundError: No module named 'utils'|syntax error near unexpected token|merge conflict|"
    "java.lang.ArrayIndexOutOfBoundsException|CORS policy blocked the request|ValueError: invalid literal"
).split("|")
TOOLS = (
    "git docker pandas numpy react django flask kubernetes webpack pytest maven gradle npm cmake regex postgres node "
    "mysql mongodb redis pytorch angular vue spring jquery linux"
).split()
CONCEPTS = (
    "a list and a tuple|an interface and an abstract class|a process and a thread|a stack and a heap|== and ===|"
    "an inner join and a left join|a shallow and a deep copy|pass by value and pass by reference|GET and POST|"
    "a pointer and a reference|static and dynamic typing|a class and an object|public and private methods"
).split("|")
BUGS = (
    "Find the bug in this code.|Fix this code:|What does this function do?|What is the output?|Why does this not work?|"
    "Refactor this.|Add error handling.|Explain this code line by line.|Make this faster.|Write unit tests for this.|"
    "Complete this:|Add comments and type annotations.|Review the following change.|"
).split("|")


def identifier(rng: random.Random) -> str:
    words = [rng.choice(VERBS), *rng.sample(NOUNS, rng.randint(1, 2))]
    return "_".join(words) if rng.random() < 0.6 else words[0] + "".join(word.title() for word in words[1:])


def python_stub(rng: random.Random) -> str:
    """A signature with a docstring, to be completed."""
    name, noun, task = identifier(rng), rng.choice(NOUNS), rng.choice(TASKS)
    arguments = ", ".join(f"{arg}: {rng.choice(TYPES)}" for arg in rng.sample(NOUNS, rng.randint(1, 3)))
    if rng.random() < 0.3:
        arguments = ", ".join(rng.sample(NOUNS, 2)) + pick(rng, "", "=None", ", *args, **kwargs", ", axis=0")
    quote = pick(rng, '"""', '"""', "'''")
    example = f"\n    >>> {name}({rng.randint(1, 9)})\n    {pick(rng, 'True', '[1, 2]', '0', 'None')}" * (
        rng.random() < 0.5
    )
    section = pick(
        rng,
        "",
        f"\n\n    Args:\n        {noun}: the {noun} to read.\n\n    Returns:\n        The {rng.choice(NOUNS)}.\n",
        f"\n\n    Parameters\n    ----------\n    {noun} : {rng.choice(TYPES)}\n        The {noun}.\n",
        f"\n\n    :param {noun}: the {noun}\n    :return: {rng.choice(TYPES)}\n",
    )
    head = pick(
        rng, "", "", "from typing import List\n\n\n", "import os\n\n\n", "@property\n", "class Solution:\n    "
    )
    summary = pick(rng, f"{task.capitalize()}.", f"Return the {noun} of the given input.", f"Given a {noun}, {task}.")
    returns = f" -> {rng.choice(TYPES)}" * (rng.random() < 0.5)
    return f"{head}def {name}({arguments}){returns}:\n    {quote}{summary}{section}{example}\n    {quote}\n"


def snippet(rng: random.Random) -> str:
    """A few lines of code in one of several languages."""
    f, a, b, n = identifier(rng), rng.choice(NOUNS), rng.choice(NOUNS), rng.randint(1, 50)
    return rng.choice(
        [
            f"def {f}({a}, {b}):\n    for i in range({n}):\n        if {a}[i] == {b}:\n            return i\n    return -1",
            f"def {f}(self, {a}=None):\n    if {a} is None:\n        raise ValueError('{a} is missing')\n    return self.{b}",
            f"with open('{a}.txt') as f:\n    {b} = [line.strip() for line in f]\nprint(len({b}))",
            f"import numpy as np\n{a} = np.zeros(({n}, 2))\n{b} = {a}.sum(axis=1)",
            f"class {a.title()}:\n    def __init__(self, {b}):\n        self.{b} = {b}",
            f"function {f}({a}) {{\n  const {b} = {a}.map(x => x * {n});\n  return {b}.filter(Boolean);\n}}",
            f"const {{ {a} }} = require('./{b}');\nasync function {f}() {{ await fetch(`/api/{a}`); }}",
            f"var {a} = document.getElementById('{b}');\n{a}.addEventListener('click', function (event) {{ {f}(); }});",
            f"public class {a.title()} {{\n    private int {b};\n    public int {f}() {{ return {b} + {n}; }}\n}}",
            f"for (int i = 0; i < {n}; i++) {{\n    {a}[i] = {b}[i + 1];\n}}",
            f'#include <stdio.h>\n\nint main(void) {{\n    char *{a} = malloc({n});\n    printf("%s\\n", {a});\n}}',
            f"/* {f.title()} the {a}. */\nstatic inline int {f}(struct {a} *{b}, const char *name)\n{{\n    return {b}->{a};\n}}",
            f"/**\n * @param {{number}} {a}\n * @return {{string}}\n */\nvar {f} = function({a}) {{\n}};",
            f"extern void {f} (const {a} *{b}, unsigned long n);\n#define MAX_{a.upper()} {n}",
            f"std::vector<int> {f}(const std::vector<int>& {a}) {{ return {{}}; }}",
            f"fn {f}({a}: &Vec<i32>) -> Option<i32> {{\n    {a}.iter().max().copied()\n}}",
            f"func {f}({a} []int) (int, error) {{\n\treturn {a}[{n}], nil\n}}",
            f"SELECT {a}.id, COUNT(*) FROM {a}s JOIN {b}s ON {a}s.id = {b}s.{a}_id WHERE {b}s.total > {n} GROUP BY {a}.id;",
            f"CREATE TABLE {a}s (id INT PRIMARY KEY, {b} VARCHAR({n}));\nINSERT INTO {a}s VALUES (1, 'x');",
            f'for f in *.{a}; do\n  mv "$f" "${{f%.{a}}}.{b}"\ndone',
            f"grep -r '{a}' . | awk '{{print ${n}}}' | sort | uniq -c",
            f'<div class="{a}">\n  <ul><li id="{b}">{n}</li></ul>\n</div>',
            f".{a} {{\n  display: flex;\n  margin: {n}px auto;\n}}",
            f"df.groupby('{a}')['{b}'].mean().reset_index()",
        ]
    )


def code_query(rng: random.Random) -> str:
    language, task, tool, error = (rng.choice(words) for words in (LANGUAGES, TASKS, TOOLS, ERRORS))
    a, b = rng.sample(NOUNS, 2)
    style = rng.random()
    if style < 0.15:
        return python_stub(rng)
    if style < 0.4:
        code, other = snippet(rng), rng.choice(LANGUAGES)
        fence = f"```{language.lower()}\n{code}\n```" if rng.random() < 0.3 else code
        request = rng.choice([*BUGS, f"Translate this to {other}.", f"I get `{error}` here:"])
        return pick(rng, f"{request}\n\n{fence}", f"{request}\n{fence}", f"{fence}\n\n{request}").strip()
    return rng.choice(
        [
            f"Write a {language} {pick(rng, 'program', 'function', 'script', 'method', 'class')} to {task}.",
            f"Write {language} code that can {task}.",
            f"Implement a {language} {pick(rng, 'function', 'method', 'routine')} that will {task}.",
            f"How do I {task} in {language}?",
            f"How can I {task} with {tool}?",
            f"What is the best way to {task} using {language}?",
            f"Create a {language} class for a {a} with a {b} field and a method to {task}.",
            f"{language}: {task}",
            f"Show me an example of how to {task} in {language}, without external libraries.",
            f"Give me a one-liner to {task}.",
            f"Implement an algorithm to {task} in O(n log n) time.",
            f"What is the time complexity of an algorithm to {task}?",
            f"Given {pick(rng, 'an array', 'a list', 'a string', 'a linked list', 'a tree', 'a matrix')} of {a}s, return "
            f"the {pick(rng, 'index', 'number', 'longest run', 'first pair')} of {b}s. You may assume the input fits "
            "into memory.",
            f"You are given two {pick(rng, 'integer arrays', 'strings', 'binary trees')} {a} and {b}. Return true if "
            "they contain the same elements.",
            f"Write a SQL query that {pick(rng, 'lists', 'counts', 'returns', 'deletes')} all {a}s with more than "
            f"{rng.randint(2, 90)} {b}s.",
            f"Write a query to select the {pick(rng, 'latest', 'average', 'highest', 'total')} {a} of each {b} from the "
            f"{a}s table.",
            f"Create a database table for {a}s with a primary key and a foreign key to {b}s.",
            f"My {language} program crashes with {error}. What is wrong?",
            f"{error} when I run {tool} on my {a} module. How do I fix it?",
            f"How do I undo a {tool} {pick(rng, 'commit', 'build', 'merge', 'deployment', 'install')}?",
            f"What is the difference between {rng.choice(CONCEPTS)} in {language}?",
            f"When should I use {rng.choice(CONCEPTS).replace(' and ', ' instead of ')} in {language}?",
            f"Why does my {language} {pick(rng, 'script', 'program', 'app', 'test', 'loop')} raise {error}?",
            f"Create a {tool} {pick(rng, 'component', 'app', 'page', 'service', 'pipeline')} that shows a {a} with a "
            f"{pick(rng, 'button', 'form', 'counter', 'table', 'menu')}.",
            f"Develop a {language} {pick(rng, 'program', 'application', 'library', 'API')} that can {task}.",
            f"Write a {language} program that reads a file, counts the {a}s and prints the {b}.",
            f"Create a table named {a}s with the columns id, {b} and date in {pick(rng, 'SQL', 'MySQL', 'PostgreSQL')}.",
            f"Given an array of integers, {pick(rng, 'return', 'find', 'print')} the "
            f"{pick(rng, 'two indices whose values add up to the target', 'length of the longest increasing run', 'kth largest element', 'number of inversions', 'sum of every subarray')}.",
            f"Given a string s, {pick(rng, 'return true if it is a palindrome', 'remove all vowels', 'find the first unique character', 'count its substrings')}.",
            f"Which data structure should I use to {task}?",
            f"Can you show me some {language} code for a {a} {pick(rng, 'parser', 'server', 'client', 'cache', 'queue')}?",
            f"How does {pick(rng, 'garbage collection', 'inheritance', 'recursion', 'async/await', 'type inference')} work in {language}?",
            f"Build a REST API with {tool} that exposes {a}s and {b}s.",
            f"Write a Dockerfile and a CI pipeline for a {language} project.",
            f"Write a regular expression that matches a {a} id such as {a[:2].upper()}-{rng.randint(100, 999)}.",
            f"Write a unit test with mocks for the {identifier(rng)}() method.",
            f"Design a {pick(rng, 'component', 'schema', 'module', 'data structure', 'web page')} that shows a list of "
            f"{a}s, in {language}.",
            f"Convert this {language} code to {rng.choice(LANGUAGES)}: {identifier(rng)}({a}, {b});",
            f"Write a command that will {task} on {pick(rng, 'Linux', 'Windows', 'macOS')} from the terminal.",
            f"Print what {identifier(rng)}() returns, which is {pick(rng, 'a JSON object', 'a pointer', 'an iterator', 'None')}.",
            f"Use {tool} to {task} and plot the result.",
            f"Write a {language} {pick(rng, 'decorator', 'generator', 'iterator', 'template', 'macro', 'closure', 'lambda')} "
            f"for {a}s.",
        ]
    )


# Everything else, in English

TOPICS = [
    *("climate change", "the French Revolution", "online dating", "jazz music", "remote work", "yoga", "black holes"),
    *("vegetarian food", "social media", "the immune system", "electric cars", "ancient Egypt", "public speaking"),
    *(
        "gardening",
        "photosynthesis",
        "the stock market",
        "chess",
        "sleep",
        "minimalism",
        "football",
        "coffee",
        "poetry",
    ),
    *(
        "space travel",
        "the Great Wall of China",
        "school uniforms",
        "volcanoes",
        "honey bees",
        "dreams",
        "tea",
        "robots",
    ),
    *("mental health", "budget holidays", "plastic waste", "Shakespeare", "democracy", "friendship", "healthy aging"),
]
AUDIENCES = ["a child", "a beginner", "my grandmother", "a tourist", "new parents", "students", "a busy manager"]
FORMS = [
    *("short story", "poem", "haiku", "speech", "blog post", "letter", "song", "dialogue", "news article", "slogan"),
    *(
        "product review",
        "toast",
        "diary entry",
        "press release",
        "cover letter",
        "tweet",
        "fairy tale",
        "essay",
        "email",
    ),
]
ROLES = ["a travel guide", "a therapist", "an interviewer", "a chef", "a history teacher", "a wizard", "a life coach"]
SENTENCES = [
    *("The meeting was moved to Friday because the manager is ill.", "She walk to the market every mornings."),
    *("I would like to complain about the noise in my hotel room.", "The soup was delicious but the waiter was rude."),
    *("Marie Curie won two Nobel Prizes.", "Rain fell on the empty street while the old man waited for his son."),
    *("Our company opened its third office in Lisbon last year.", "Me and him goes to school by bus."),
]
THINGS = (
    "bicycle birthday party camping trip cat garden guitar job interview kitchen marathon novel picnic wedding".split()
)
ANIMALS = "dolphin eagle fox hedgehog horse octopus owl penguin shark spider tiger whale".split()
PLACES = "Argentina Canada Egypt India Japan Kenya Lisbon Norway Paris Peru Seoul Vienna".split()


def instruct_query(rng: random.Random) -> str:
    topic, other = rng.sample(TOPICS, 2)
    form, audience, role, sentence = (rng.choice(words) for words in (FORMS, AUDIENCES, ROLES, SENTENCES))
    thing, place, count, name = rng.choice(THINGS), rng.choice(PLACES), rng.randint(2, 10), rng.choice(PEOPLE)
    animal, second = rng.sample(ANIMALS, 2)
    return rng.choice(
        [
            f"Write a {form} about {topic}.",
            f"Write a {form} that explains {topic} to {audience}.",
            f"Compose a {pick(rng, 'funny', 'moving', 'formal', 'persuasive', 'short')} {form} for {audience}.",
            f"Explain {topic} in simple terms.",
            f"What is {topic}?",
            f"Why do people care about {topic}?",
            f"What are the advantages and disadvantages of {topic}?",
            f"Compare {topic} and {other}.",
            f"What is the difference between {topic} and {other}?",
            f"How does {topic} affect {other}?",
            f"Describe the history of {topic} in {count} sentences.",
            f"Give me {count} tips about {topic}.",
            f"List {count} interesting facts about {topic}.",
            f"Name {count} famous people from {place}.",
            f"What should I see in {place} in {count} days?",
            f"Plan a {thing} for {count} people with little money.",
            f"What do I need for a {thing}?",
            f"Suggest {count} names for a {animal}.",
            f"How can I become better at {topic}?",
            f"Where do {animal}s live and what do they eat?",
            f"Which is faster, a {animal} or a {second}?",
            f"Who invented the {thing}?",
            f"When did {place} host the Olympic Games?",
            f"What is the capital of {place}, and which languages are spoken there?",
            f"Is it rude to talk about {topic} in {place}?",
            f"Act as {role} and answer my questions about {topic}.",
            f"Imagine you are {role}. Describe your day.",
            f"You are {role}. My first request: I need help with my {thing}.",
            f"Rewrite this sentence in a {pick(rng, 'formal', 'friendly', 'simple', 'passive')} way: {sentence}",
            f"Correct the grammar: {sentence}",
            f"Translate into {pick(rng, 'French', 'Spanish', 'German', 'Italian')}: {sentence}",
            f"Summarize the following text.\n\n{sentence} {rng.choice(SENTENCES)}",
            f"Is the tone of this text positive or negative? {sentence}",
            f"Who is mentioned in this text?\n{sentence}",
            f"Classify the words as animals or places: {animal}, {place}, {second}.",
            f"Find a synonym for the word '{pick(rng, 'happy', 'brave', 'quick', 'angry', 'quiet', 'bright')}'.",
            f"What does the saying '{pick(rng, 'time flies', 'break a leg', 'a piece of cake', 'once in a blue moon')}' mean?",
            f"Tell me a joke about {animal}s.",
            f"{name} and I had an argument about {topic}. What should I say?",
            f"Should I learn about {topic} or {other} first?",
            f"My {animal} does not eat. What could be the reason?",
            f"Create a weekly plan for {audience} who wants to learn about {topic}.",
            f"Draft a reply to this message: {sentence}",
            f"Continue the story: {sentence}",
            f"Give an example of {pick(rng, 'a metaphor', 'irony', 'alliteration', 'an idiom', 'a proverb')} about {topic}.",
            f"How do I cook {pick(rng, 'rice', 'lentils', 'salmon', 'an omelette', 'pancakes')} for {count} people?",
            f"Recommend {count} {pick(rng, 'books', 'films', 'podcasts', 'museums', 'songs')} about {topic}.",
            f"What would happen if {topic} did not exist?",
            f"Generate a title and an outline for a talk on {topic}.",
            f"How long does it take to travel from {place} to {rng.choice(PLACES)}?",
        ]
    )


# Chinese

ZH_SUBJECTS = "历史 地理 生物 化学 物理 政治 语文 法律 医学 会计 计算机网络 教育学 心理学 经济学".split()
ZH_TOPICS = "秦始皇统一六国 细胞分裂 辛亥革命 市场经济 牛顿第二定律 氧化还原反应 合同的效力 季风气候 操作系统 唐诗 高血压 通货膨胀".split()
ZH_OPTIONS = (
    "促进生产发展 加强中央集权 改变分子结构 提高运行效率 减少成本 增加收入 保护环境 维护公平 扩大需求 影响血压".split()
)
ZH_PEOPLE = "小红 小刚 王老师 李明 张叔叔 陈静".split()
ZH_TASKS = "排序 反转字符串 读取文件 计算平均数 判断闰年 查找重复元素 连接数据库".split()
ZH_THINGS = "旅行 家乡 环保 友谊 读书 春节 健康饮食 手机 猫 大学生活".split()


def chinese_query(rng: random.Random) -> str:
    subject, topic, other = rng.choice(ZH_SUBJECTS), rng.choice(ZH_TOPICS), rng.choice(ZH_TOPICS)
    person, task, thing = rng.choice(ZH_PEOPLE), rng.choice(ZH_TASKS), rng.choice(ZH_THINGS)
    a, b, c = rng.randint(2, 90), rng.randint(2, 60), rng.randint(2, 9)
    dot = pick(rng, ".", "．", "、", " ")
    options = pick(rng, " ", "\n", "  ").join(f"{x}{dot}{o}" for x, o in zip("ABCD", rng.sample(ZH_OPTIONS, 4)))
    blank = pick(rng, "（ ）", "(  )", "____", "（　　）")
    return rng.choice(
        [
            f"下列关于{topic}的说法，正确的是{blank}\n{options}",
            f"{rng.randint(1, 40)}{dot}{topic}的主要影响是{blank} {options}",
            f"以下是中国关于{subject}考试的单项选择题，请选出正确答案。\n{topic}属于{blank}\n{options}",
            f"材料：{topic}与{other}同时发生。据此可知{blank} {options}",
            f"简述{topic}的原因和意义。",
            f"名词解释：{topic}",
            f"{subject}题：请分析{topic}和{other}之间的关系。",
            f"已知函数 f(x)={c}x^2-{a}x+{b}，求 f(x) 的最小值。",
            f"设集合 A={{x|x>{c}}}，B={{x|x<{a}}}，则 A∩B={blank}",
            f"计算：${a} \\times {c} - \\frac{{{b}}}{{{c}}}$ 的值。",
            f"{person}买了{a}支铅笔，每支{c}元，一共花了多少元？",
            f"一列火车每小时行{a}千米，{c}小时行多少千米？",
            f"用{rng.choice(LANGUAGES)}语言编写一个函数，实现{task}。",
            f"{rng.choice(LANGUAGES)}中如何{task}？请给出代码。",
            f"下面的代码有什么问题？\n{snippet(rng)}",
            f"写一条SQL语句，查询年龄大于{a}的学生。",
            f"请写一篇关于{thing}的作文，不少于{a * 10}字。",
            f"以{thing}为题写一首诗。",
            f"把下面的句子翻译成{pick(rng, '英文', '中文', '文言文')}：{rng.choice(SENTENCES)}",
            f"给{person}写一封信，谈谈{thing}。",
            f"请推荐{c}本关于{thing}的书。",
            f"为什么{thing}很重要？",
            f"帮我列一个关于{thing}的计划。",
            f"判断这句话的情感：{person}觉得{thing}很无聊。",
        ]
    )


# All of them


def math_query(rng: random.Random) -> str:
    return latex_problem(rng) if rng.random() < 0.6 else plain_problem(rng)


STYLES: dict[str, Callable[[random.Random], str]] = {
    "instruct": instruct_query,
    "math": math_query,
    "code": code_query,
    "chinese": chinese_query,
}


def style_queries(kind: str, count: int, seed: int) -> list[str]:
    """`count` different queries of one kind; the same arguments give the same list."""
    rng = random.Random(f"{kind}/{seed}")
    queries: dict[str, None] = {}
    while len(queries) < count:
        queries[STYLES[kind](rng)] = None
    return list(queries)


def style_rows(kinds: dict[str, str], count: int, seed: int) -> list[dict[str, str | bool]]:
    """Router data with `count` queries of every expert in `kinds`, which says of which kind it is."""
    return [
        {"text": text, "expert": expert, "source": f"generated {kind} queries", "generated": True}
        for expert, kind in kinds.items()
        for text in style_queries(kind, count, seed)
    ]


def expert_and_kind(argument: str) -> tuple[str, str]:
    expert, _, kind = argument.rpartition("=")
    if not expert or kind not in STYLES:
        raise argparse.ArgumentTypeError(f"{argument!r} is not an expert's name = one of {', '.join(STYLES)}")
    return expert, kind


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", type=expert_and_kind, metavar="EXPERT=KIND")
    parser.add_argument("--count", type=int, default=1000, help="queries of each expert")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-file", type=Path, required=True)
    args = parser.parse_args(arguments)
    rows = style_rows(dict(args.kinds), args.count, args.seed)
    args.output_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
