"""Questions, short texts and general instructions: tiny Dolly, tiny HELM scenarios, tiny Alpaca.

A small world is fixed here: what things are, their colours and sounds, which animal is bigger, and
invented countries. GENERATORS has one function a category; each returns an instruction, a context,
a long answer and a short one. Pre-training mostly gives the long answer, the clients' Dolly always
the short one. `split_of` keeps the texts of tests out of all training.
"""
from gen_maths import ITEMS, NAMES, split_of

PEOPLE = [n for group in NAMES.values() for n in group]
KINDS = {
    "animal": "ant mouse cat dog sheep pig horse cow bear whale".split(),        # small to large
    "fruit": "plum pear apple lemon melon grape".split(),
    "tool": "hammer saw drill nail axe".split(),
    "color": "red blue green white black gray".split(),
}
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COLOR_OF = {
    "snow": "white",
    "grass": "green",
    "coal": "black",
    "blood": "red",
    "the sky": "blue",
    "a lemon": "yellow",
    "an orange": "orange",
    "ash": "gray",
    "a leaf": "green",
    "milk": "white",
    "a ruby": "red",
    "the sea": "blue",
}
SOUND_OF = {
    "cat": "meow",
    "dog": "woof",
    "sheep": "baa",
    "pig": "oink",
    "cow": "moo",
    "horse": "neigh",
}
OPPOSITES = ("hot/cold big/small up/down old/new wet/dry fast/slow day/night rich/poor "
             "long/short open/closed full/empty left/right")
OPPOSITE = dict(pair.split("/") for pair in OPPOSITES.split())
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
COUNTRIES = "Zor Mund Bela Tarn Ulm Kesh Doria Fenn Gala Harn Ilia Jora".split()       # invented
CAPITALS = "Oban Rilo Saro Tuva Nemi Pico Luro Vada Mora Kilo Dena Bura".split()
CITIES = CAPITALS[:8]
FOODS = "rice fish bread soup corn beans".split()
JOBS = "baker driver nurse farmer singer teacher".split()
PLACES = "box bag desk garden kitchen car".split()
CAPITAL_OF = dict(zip(COUNTRIES, CAPITALS))
FOOD_OF = dict(zip(COUNTRIES, FOODS * 2))
# How often pre-training asks a question of each category.
PRETRAIN_SHARES = {
    "open_qa": 25,
    "closed_qa": 14,
    "general_qa": 15,
    "classification": 14,
    "information_extraction": 10,
    "brainstorming": 9,
    "summarization": 8,
    "creative_writing": 5,
}
# How often the clients' data does: unevenly, as in Dolly.
CLIENT_SHARES = {
    "open_qa": 5,
    "closed_qa": 32,
    "general_qa": 14,
    "classification": 22,
    "information_extraction": 9,
    "brainstorming": 7,
    "summarization": 7,
    "creative_writing": 4,
}


def a(word):
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# ---- one generator a category: (instruction, context, long answer, short answer) ----

def portrait(r):
    """Three to five facts about two people, one or both of whom are named.

    Returns the text, questions about it as (question, long answer, short answer), the two names
    and the facts' sentences.
    """
    p, q = r.sample(PEOPLE, 2)
    city, city2 = r.sample(CITIES, 2)
    job, item, place = r.choice(JOBS), r.choice(ITEMS), r.choice(PLACES)
    color, age = r.choice(KINDS["color"]), r.randint(18, 90)
    facts = [                                   # (sentence, question, long answer, short answer)
        (f"{p} lives in {city}.",
         f"Where does {p} live?", f"{p} lives in {city}.", city),
        (f"{p} is {a(job)}.",
         f"What is the job of {p}?", f"The job of {p} is {job}.", job),
        (f"{q} comes from {city2}.",
         f"Where does {q} come from?", f"{q} comes from {city2}.", city2),
        (f"The {item} are in the {place}.",
         f"Where are the {item}?", f"The {item} are in the {place}.", place),
        (f"{q} has a {color} hat.",
         f"What color is the hat of {q}?", f"The hat of {q} is {color}.", color),
        (f"{p} is {age} years old.",
         f"How old is {p}?", f"{p} is {age} years old.", str(age)),
    ]
    some = r.sample(facts, r.randint(3, 5))
    sentences = [sentence for sentence, *_ in some]
    return " ".join(sentences), [tuple(asked) for _, *asked in some], (p, q), sentences


def closed_qa(r):
    text, asked, _, _ = portrait(r)
    ask, long, short = r.choice(asked)
    return ask, text, long, short


def open_qa(r):
    country, thing = r.choice(COUNTRIES), r.choice(list(COLOR_OF))
    animal, word = r.choice(list(SOUND_OF)), r.choice(list(OPPOSITE))
    capital, food, color = CAPITAL_OF[country], FOOD_OF[country], COLOR_OF[thing]
    sound, opposite = SOUND_OF[animal], OPPOSITE[word]
    ask, long, short = r.choice((
        (f"What is the capital of {country}?", f"The capital of {country} is {capital}.", capital),
        (f"What do people eat in {country}?", f"People in {country} eat {food}.", food),
        (f"What color is {thing}?", f"The color of {thing} is {color}.", color),
        (f"What does a {animal} say?", f"A {animal} says {sound}.", sound),
        (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.", opposite),
    ))
    return ask, "", long, short


def general_qa(r):
    """Yes or no: sizes, numbers, countries."""
    x, y = r.sample(KINDS["animal"], 2)
    m, n = r.randint(2, 999), r.randint(2, 999)
    country, city = r.choice(COUNTRIES), r.choice(CAPITALS)
    capital = CAPITAL_OF[country]
    city = city if r.random() < .5 else capital
    bigger = KINDS["animal"].index(x) > KINDS["animal"].index(y)
    size, amount = "bigger" if bigger else "smaller", "more" if m > n else "not more"
    ask, truth, long = r.choice((
        (f"Is {a(x)} bigger than {a(y)}?", bigger, f"{a(x).capitalize()} is {size} than {a(y)}."),
        (f"Is {m} more than {n}?", m > n, f"{m} is {amount} than {n}."),
        (f"Is {city} the capital of {country}?", city == capital,
         f"The capital of {country} is {capital}."),
    ))
    short = "Yes" if truth else "No"
    return ask, "", f"{short}. {long}", short


def classification(r):
    thing = r.choice(list(KIND_OF))
    kind, other = KIND_OF[thing], r.choice([k for k in KINDS if k != KIND_OF[thing]])
    k1, k2 = r.sample((kind, other), 2)
    return (f"Is {thing} {a(k1)} or {a(k2)}?", "",
            f"The word {thing} is the name of {a(kind)}.", kind)


def information_extraction(r):
    text, _, (p, q), _ = portrait(r)
    found = " and ".join(sorted((n for n in (p, q) if n in text), key=text.index))
    if r.random() < .5:
        return "Who is in the text?", text, f"The people in the text are {found}.", found
    n = len(text.split(". "))
    return "How many facts does the text have?", text, f"The text has {n} facts.", str(n)


def brainstorming(r):
    kind, n = r.choice(list(KINDS)), r.choice((2, 3))
    names = ", ".join(r.sample(KINDS[kind], n))
    return f"Name {n} {kind}s.", "", f"Here are {n} {kind}s: {names}.", names


def summarization(r):
    text, _, _, facts = portrait(r)
    return ("Say the first fact again.", text,
            f"The first fact of the text is this. {facts[0]}", facts[0].rstrip("."))


def creative_writing(r):
    color, animal, place = r.choice(KINDS["color"]), r.choice(KINDS["animal"]), r.choice(PLACES)
    return (f"Write a line about {a(color)} {animal}.", "",
            f"Once {a(color)} {animal} sat in the {place} and was very happy there.",
            f"{a(color).capitalize()} {animal} sat in the {place}.")


GENERATORS = {f.__name__: f for f in (
    open_qa, closed_qa, general_qa, classification,
    information_extraction, brainstorming, summarization, creative_writing)}


def question(rng, split, category=None):
    """(category, instruction, context, long answer, short answer).

    Only questions with a context belong to a split; those about the fixed world are too few to
    divide and occur in every one.
    """
    while True:
        name = category or rng.choices(list(PRETRAIN_SHARES), PRETRAIN_SHARES.values())[0]
        ask, text, long, short = GENERATORS[name](rng)
        if not text or split_of(text) == split:
            return name, ask, text, long, short


def dolly_row(rng, split="train") -> dict:
    """A row of the clients' data, with the short answer.

    It has two forms that `pretrain_row` has not: yes or no about a text, a letter as the answer.
    """
    category = rng.choices(list(CLIENT_SHARES), CLIENT_SHARES.values())[0]
    _, ask, text, long, short = question(rng, split, category)
    if category == "closed_qa" and rng.random() < .5:
        _, ask, _, long, short = question(rng, split, "general_qa")
        text = f"{long.split('. ')[1]} {text}"
    elif category == "classification" and rng.random() < .7:
        ask, options, k = choices(rng, split)
        ask, short = f"{ask}\n{listed(options)}", "ABCD"[k]
    return {"instruction": ask, "context": text, "response": short, "category": category}


def pretrain_row(rng, shorts=.35) -> dict:
    _, ask, text, long, short = question(rng, "pretrain")
    return {"instruction": ask, "input": text, "output": short if rng.random() < shorts else long}


# ---- general instructions: what only pre-training and the public set hold ----

def arithmetic(r):
    """(instruction, no context, answer): one sum, difference, product or quotient."""
    kind = r.choice("+-**/")
    m, n = r.randint(5, 400), r.randint(2, 199)
    if kind == "*":
        m, n = r.randint(11, 99), r.randint(2, 12)
    elif kind == "/":
        n = r.randint(2, 9)
        m = n * r.randint(3, 90)
    elif kind == "-":
        m += n                                  # no difference is negative
    v = {"+": m + n, "-": m - n, "*": m * n, "/": m // n}[kind]
    ask = r.choice((f"What is {m}{kind}{n}?", f"Compute {m}{kind}{n}."))
    return ask, "", f"{m}{kind}{n}={v}."


def general_row(r) -> dict:
    words = r.sample(ITEMS + KINDS["color"] + KINDS["fruit"], r.randint(2, 5))
    numbers = r.sample(range(2, 99), r.randint(3, 5))
    line, values, n = ", ".join(words), ", ".join(map(str, numbers)), r.randint(2, 4)
    sums, person = [arithmetic(r) for _ in range(4)], r.choice(PEOPLE)
    ask, text, out = r.choice((
        *sums,                                  # four of the thirteen kinds of row
        ("Write the words backwards.", line, ", ".join(words[::-1])),
        ("Sort the numbers.", values, ", ".join(map(str, sorted(numbers)))),
        ("Which number is the largest?", values, f"The largest number is {max(numbers)}."),
        ("What is the first word?", line, f"The first word is {words[0]}."),
        ("What is the last word?", line, f"The last word is {words[-1]}."),
        ("How many words are there?", line, f"There are {len(words)} words."),
        (f"Say {words[0]} {n} times.", "", " ".join([words[0]] * n)),
        (f"Greet {person}.", "", f"Hello {person}, how are you?"),
        ("Write the words in capitals.", words[0], words[0].upper()),
    ))
    return {"instruction": ask, "input": text, "output": out}


# ---- multiple choice, as the HELM scenarios have it ----

def choices(rng, split="pretrain", n=4):
    """(question, n options, index of the right one) about the fixed world."""
    colors, sounds = KINDS["color"] + ["yellow", "orange"], list(SOUND_OF.values())
    while True:
        country, thing = rng.choice(COUNTRIES), rng.choice(list(COLOR_OF))
        word, animal = rng.choice(list(OPPOSITE)), rng.choice(list(SOUND_OF))
        ask, right, pool = rng.choice((
            (f"The capital of {country} is", CAPITAL_OF[country], CAPITALS),
            (f"The color of {thing} is", COLOR_OF[thing], colors),
            (f"The opposite of {word} is", OPPOSITE[word], list(OPPOSITE)),
            (f"People in {country} eat", FOOD_OF[country], FOODS),
            (f"A {animal} says", SOUND_OF[animal], sounds),
        ))
        options = rng.sample([p for p in pool if p != right], n - 1) + [right]
        rng.shuffle(options)
        if split_of(ask + " ".join(options)) == split:
            return ask, options, options.index(right)


def listed(options) -> str:
    return "\n".join(f"{letter}. {o}" for letter, o in zip("ABCD", options))


def choice_row(rng) -> dict:
    """A question with four options; the answer is its letter or the whole sentence."""
    ask, options, k = choices(rng)
    output = "ABCD"[k] if rng.random() < .35 else f"{ask} {options[k]}."
    return {"instruction": f"{ask}\n{listed(options)}", "input": "", "output": output}
