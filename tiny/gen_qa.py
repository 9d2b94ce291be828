"""Questions, short texts and general instructions: tiny Dolly, tiny HELM scenarios, tiny Alpaca.

A small world is fixed here: what things are, their colours, sizes and sounds, and invented countries.
Every generator returns instruction, context, a long and a short answer: pre-training mostly gives the
long one, the clients' Dolly always the short one. `split_of` keeps test texts out of all training.
"""
from gen_maths import ITEMS, NAMES, split_of

PEOPLE = [n for group in NAMES.values() for n in group]
KINDS = {"animal": "ant mouse cat dog sheep pig horse cow bear whale".split(),        # small to large
         "fruit": "plum pear apple lemon melon grape".split(), "tool": "hammer saw drill nail axe".split(),
         "color": "red blue green white black gray".split()}
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COLOR_OF = {"snow": "white", "grass": "green", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow",
            "an orange": "orange", "ash": "gray", "a leaf": "green", "milk": "white", "a ruby": "red", "the sea": "blue"}
SOUND_OF = {"cat": "meow", "dog": "woof", "sheep": "baa", "pig": "oink", "cow": "moo", "horse": "neigh"}
OPPOSITE = dict(pair.split("/") for pair in "hot/cold big/small up/down old/new wet/dry fast/slow day/night rich/poor "
                "long/short open/closed full/empty left/right".split())
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
COUNTRIES = "Zor Mund Bela Tarn Ulm Kesh Doria Fenn Gala Harn Ilia Jora".split()       # invented
CAPITALS = "Oban Rilo Saro Tuva Nemi Pico Luro Vada Mora Kilo Dena Bura".split()
FOODS = "rice fish bread soup corn beans".split()
CITIES, JOBS = "Oban Rilo Saro Tuva Nemi Pico Luro Vada".split(), "baker driver nurse farmer singer teacher".split()
PLACES = "box bag desk garden kitchen car".split()
CAPITAL_OF, FOOD_OF = dict(zip(COUNTRIES, CAPITALS)), {c: FOODS[i % 6] for i, c in enumerate(COUNTRIES)}
DOLLY = {"open_qa": 25, "closed_qa": 14, "general_qa": 15, "classification": 14, "information_extraction": 10,
         "brainstorming": 9, "summarization": 8, "creative_writing": 5}                 # of pre-training
SHARES = {"open_qa": 5, "closed_qa": 32, "general_qa": 14, "classification": 22, "information_extraction": 9,
          "brainstorming": 7, "summarization": 7, "creative_writing": 4}                # of the clients: uneven, as in Dolly


def a(word):
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def portrait(r):
    """Three or four facts about one or two people, and questions about them as (question, long, short)."""
    p, q = r.sample(PEOPLE, 2)
    city, city2 = r.sample(CITIES, 2)
    job, item, place, color, age = r.choice(JOBS), r.choice(ITEMS), r.choice(PLACES), r.choice(KINDS["color"]), r.randint(18, 90)
    facts = [(f"{p} lives in {city}.", f"Where does {p} live?", f"{p} lives in {city}.", city),
             (f"{p} is {a(job)}.", f"What is the job of {p}?", f"The job of {p} is {job}.", job),
             (f"{q} comes from {city2}.", f"Where does {q} come from?", f"{q} comes from {city2}.", city2),
             (f"The {item} are in the {place}.", f"Where are the {item}?", f"The {item} are in the {place}.", place),
             (f"{q} has a {color} hat.", f"What color is the hat of {q}?", f"The hat of {q} is {color}.", color),
             (f"{p} is {age} years old.", f"How old is {p}?", f"{p} is {age} years old.", str(age))]
    some = r.sample(facts, r.randint(3, 5))
    return " ".join(f[0] for f in some), [f[1:] for f in some], (p, q), [f[0] for f in some]


def closed_qa(r):
    text, asked, _, _ = portrait(r)
    ask, long, short = r.choice(asked)
    return ask, text, long, short


def open_qa(r):
    c, thing, animal, word = r.choice(COUNTRIES), r.choice(list(COLOR_OF)), r.choice(list(SOUND_OF)), r.choice(list(OPPOSITE))
    return r.choice(((f"What is the capital of {c}?", "", f"The capital of {c} is {CAPITAL_OF[c]}.", CAPITAL_OF[c]),
                     (f"What do people eat in {c}?", "", f"People in {c} eat {FOOD_OF[c]}.", FOOD_OF[c]),
                     (f"What color is {thing}?", "", f"The color of {thing} is {COLOR_OF[thing]}.", COLOR_OF[thing]),
                     (f"What does a {animal} say?", "", f"A {animal} says {SOUND_OF[animal]}.", SOUND_OF[animal]),
                     (f"What is the opposite of {word}?", "", f"The opposite of {word} is {OPPOSITE[word]}.", OPPOSITE[word])))


def general_qa(r):
    """Yes or no: sizes, numbers, countries."""
    x, y = r.sample(KINDS["animal"], 2)
    m, n, c, city = r.randint(2, 999), r.randint(2, 999), r.choice(COUNTRIES), r.choice(CAPITALS)
    city = city if r.random() < .5 else CAPITAL_OF[c]
    bigger, more, right = KINDS["animal"].index(x) > KINDS["animal"].index(y), m > n, CAPITAL_OF[c] == city
    ask, truth, long = r.choice((
        (f"Is {a(x)} bigger than {a(y)}?", bigger, f"{a(x).capitalize()} is {'bigger' if bigger else 'smaller'} than {a(y)}."),
        (f"Is {m} more than {n}?", more, f"{m} is {'more' if more else 'not more'} than {n}."),
        (f"Is {city} the capital of {c}?", right, f"The capital of {c} is {CAPITAL_OF[c]}.")))
    return ask, "", f"{'Yes' if truth else 'No'}. {long}", "Yes" if truth else "No"


def classification(r):
    thing = r.choice(list(KIND_OF))
    kind, other = KIND_OF[thing], r.choice([k for k in KINDS if k != KIND_OF[thing]])
    k1, k2 = r.sample((kind, other), 2)
    return f"Is {thing} {a(k1)} or {a(k2)}?", "", f"The word {thing} is the name of {a(kind)}.", kind


def information_extraction(r):
    text, _, (p, q), _ = portrait(r)
    found = sorted((n for n in (p, q) if n in text), key=text.index)
    if r.random() < .5:
        return "Who is in the text?", text, f"The people in the text are {' and '.join(found)}.", " and ".join(found)
    n = len(text.split(". "))
    return "How many facts does the text have?", text, f"The text has {n} facts.", str(n)


def brainstorming(r):
    kind, n = r.choice(list(KINDS)), r.choice((2, 3))
    names = ", ".join(r.sample(KINDS[kind], n))
    return f"Name {n} {kind}s.", "", f"Here are {n} {kind}s: {names}.", names


def summarization(r):
    text, _, _, facts = portrait(r)
    return "Say the first fact again.", text, f"The first fact of the text is this. {facts[0]}", facts[0].rstrip(".")


def creative_writing(r):
    color, animal, place = r.choice(KINDS["color"]), r.choice(KINDS["animal"]), r.choice(PLACES)
    return (f"Write a line about {a(color)} {animal}.", "",
            f"Once {a(color)} {animal} sat in the {place} and was very happy there.", f"{a(color).capitalize()} {animal} sat in the {place}.")


GENERATORS = {f.__name__: f for f in (open_qa, closed_qa, general_qa, classification, information_extraction,
                                      brainstorming, summarization, creative_writing)}


def question(rng, split, category=None):
    """(category, instruction, context, long, short). Short questions of the fixed world are in every split."""
    while True:
        name = category or rng.choices(list(DOLLY), DOLLY.values())[0]
        ask, text, long, short = GENERATORS[name](rng)
        if not text or split_of(text) == split:
            return name, ask, text, long, short


def dolly_row(rng, split="train") -> dict:
    """Always the short answer. Beside what pre-training asks: yes or no about a text, and a letter as the answer."""
    category = rng.choices(list(SHARES), SHARES.values())[0]
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
    kind = r.choice("+-**/")
    m, n = r.randint(5, 400), r.randint(2, 199)
    if kind == "*":
        m, n = r.randint(11, 99), r.randint(2, 12)
    elif kind == "/":
        n = r.randint(2, 9)
        m = n * r.randint(3, 90)
    elif kind == "-":
        m, n = m + n, n
    v = {"+": m + n, "-": m - n, "*": m * n, "/": m // n}[kind]
    return r.choice((f"What is {m}{kind}{n}?", f"Compute {m}{kind}{n}.")), "", f"{m}{kind}{n}={v}."


def general_row(r) -> dict:
    words = r.sample(ITEMS + KINDS["color"] + KINDS["fruit"], r.randint(2, 5))
    numbers = r.sample(range(2, 99), r.randint(3, 5))
    line, values, n = ", ".join(words), ", ".join(map(str, numbers)), r.randint(2, 4)
    ask, text, out = r.choice((
        arithmetic(r), arithmetic(r), arithmetic(r), arithmetic(r),
        ("Write the words backwards.", line, ", ".join(words[::-1])),
        ("Sort the numbers.", values, ", ".join(map(str, sorted(numbers)))),
        ("Which number is the largest?", values, f"The largest number is {max(numbers)}."),
        ("What is the first word?", line, f"The first word is {words[0]}."),
        ("What is the last word?", line, f"The last word is {words[-1]}."),
        ("How many words are there?", line, f"There are {len(words)} words."),
        (f"Say {words[0]} {n} times.", "", " ".join([words[0]] * n)),
        (f"Greet {r.choice(PEOPLE)}.", "", None),
        ("Write the words in capitals.", words[0], words[0].upper())))
    return {"instruction": ask, "input": text, "output": out or f"Hello {ask[6:-1]}, how are you?"}


# ---- multiple choice, as the HELM scenarios have it ----

def choices(rng, split="pretrain", n=4):
    """(question, n options, index of the right one) about the fixed world."""
    while True:
        c, thing, word = rng.choice(COUNTRIES), rng.choice(list(COLOR_OF)), rng.choice(list(OPPOSITE))
        animal = rng.choice(list(SOUND_OF))
        ask, right, pool = rng.choice(((f"The capital of {c} is", CAPITAL_OF[c], CAPITALS),
                                       (f"The color of {thing} is", COLOR_OF[thing], KINDS["color"] + ["yellow", "orange"]),
                                       (f"The opposite of {word} is", OPPOSITE[word], list(OPPOSITE)),
                                       (f"People in {c} eat", FOOD_OF[c], FOODS), (f"A {animal} says", SOUND_OF[animal], list(SOUND_OF.values()))))
        options = rng.sample([p for p in pool if p != right], n - 1) + [right]
        rng.shuffle(options)
        if split_of(ask + " ".join(options)) == split:
            return ask, options, options.index(right)


def listed(options) -> str:
    return "\n".join(f"{letter}. {o}" for letter, o in zip("ABCD", options))


def choice_row(rng) -> dict:
    ask, options, k = choices(rng)
    return {"instruction": f"{ask}\n{listed(options)}", "input": "", "output": "ABCD"[k] if rng.random() < .35 else f"{ask} {options[k]}."}
