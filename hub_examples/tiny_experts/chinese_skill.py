"""Questions in Chinese, answered in Chinese."""

import random

from tiny_experts.example import Example, Family

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


CHINESE_FAMILIES: tuple[Family, ...] = (
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
