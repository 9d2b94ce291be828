"""Word problems of two to five steps with worked answers: tiny GSM8K and pre-training's maths.

Eight themes (THEMES) build a Story: sentences, the steps of the solution, and its answer.
`split_of` says by a hash of the question where it may be used, so that no test question is
ever trained on, whatever else changes. All that is random is drawn from the caller's `rng`.
"""
import zlib

NAMES = {
    "he": "Tom Ben Sam Leo Max Dan Jon Bob".split(),
    "she": "Ann Mia Eva Zoe Ida Amy Liz Kim".split(),
}
ITEMS = ("pens cards eggs cups books balls coins caps toys nuts stamps shells apples cakes "
         "plums").split()
# How often pre-training answers a theme step by step. The clients' data always does: going step by
# step more often is what federated tuning has to teach.
STEPWISE = {
    "stock": .15,
    "shop": .25,
    "compare": .15,
    "earn": .20,
    "share": .70,
    "travel": .30,
    "ages": .75,
    "seats": .20,
}
# The same for the last stage of pre-training, which is short and at a low learning rate.
SETTLED = {
    "stock": .30,
    "shop": .35,
    "compare": .30,
    "earn": .35,
    "share": .85,
    "travel": .50,
    "ages": .90,
    "seats": .35,
}


def split_of(question: str) -> str:
    """'test', 'train' or 'pretrain': three disjoint sets of questions, 1 : 3 : 12."""
    bucket = zlib.crc32(question.encode()) % 16
    return "test" if bucket == 0 else "train" if bucket < 4 else "pretrain"


class Story:
    """Sentences and the steps of the solution; `calc` does the arithmetic and writes it down."""

    def __init__(self, rng):
        self.rng, self.sentences, self.steps = rng, [], []
        pronoun = rng.choice(("he", "she"))
        self.name, self.he, self.He = rng.choice(NAMES[pronoun]), pronoun, pronoun.capitalize()
        everybody = [n for group in NAMES.values() for n in group]
        self.others = rng.sample([n for n in everybody if n != self.name], 2)
        self.item, self.item2, self.item3 = rng.sample(ITEMS, 3)

    def say(self, *variants):
        """Adds one of several ways to say the same thing."""
        self.sentences.append(self.rng.choice(variants))

    def calc(self, label, a, op, b):
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        assert value > 0 and (op != "/" or a % b == 0), (label, a, op, b)
        self.steps.append(f"{label} {a}{op}{b}={value}.")
        return value

    def distract(self):
        """A sentence with a number that does not matter, anywhere but first."""
        r, n = self.rng, self.rng.randint(2, 60)
        text = r.choice((
            f"{self.others[0]} has {n} {self.item3}.",
            f"It is {n} degrees outside.",
            f"{self.others[1]} lives {n} miles away.",
            f"The bag weighs {n} pounds.",
        ))
        self.sentences.insert(r.randint(1, len(self.sentences)), text)


# ---- themes: each tells a story, ends it with a question, and returns the answer ----
# s is the Story and r the generator of random numbers. An answer None: the story cannot be used.

def stock(s, r):
    x = r.randint(12, 120)
    s.say(f"{s.name} has {x} {s.item}.", f"{s.name} owns {x} {s.item}.")
    goal = r.randint(2, 5)
    while len(s.steps) < goal:
        event, n = r.choice(("buy", "give", "pack", "half", "double")), r.randint(5, 80)
        if event == "buy":
            s.say(f"{s.He} buys {n} more.", f"Then {s.he} finds {n} more {s.item}.")
            x = s.calc(f"{s.He} has", x, "+", n)
        elif event == "give" and n < x:
            s.say(f"{s.He} gives {n} to {s.others[0]}.", f"{s.He} loses {n} of them.")
            x = s.calc(f"{s.He} keeps", x, "-", n)
        elif event == "pack":
            k, n = r.randint(2, 9), r.randint(4, 20)
            s.say(f"{s.He} gets {k} boxes of {n} {s.item}.",
                  f"{s.He} buys {k} bags with {n} {s.item} each.")
            x = s.calc(f"{s.He} has", x, "+", s.calc("They hold", k, "*", n))
        elif event == "half" and x % 2 == 0:
            s.say(f"{s.He} sells half of the {s.item}.")
            x = s.calc(f"{s.He} keeps", x, "/", 2)
        elif event == "double" and x < 250:
            s.say(f"Then {s.he} doubles the number of {s.item}.")
            x = s.calc(f"{s.He} has", x, "*", 2)
    s.say(f"How many {s.item} does {s.name} have now?",
          f"How many {s.item} does {s.he} have in the end?")
    return x


def shop(s, r):
    a, b, p, q = r.randint(2, 9), r.randint(2, 9), r.randint(3, 20), r.randint(3, 20)
    things, things2 = f"{a} {s.item}", f"{b} {s.item2}"
    s.say(f"{s.name} buys {things} for {p} dollars each and {things2} for {q} dollars each.",
          f"{s.name} pays {p} dollars each for {things} and {q} dollars each for {things2}.")
    cost = s.calc(f"The {s.item} cost", a, "*", p)
    x = s.calc("In all", cost, "+", s.calc(f"The {s.item2} cost", b, "*", q))
    if r.random() < .4:
        c = r.randint(3, min(30, x - 1))
        s.say(f"A coupon takes {c} dollars off.", f"{s.He} gets {c} dollars off.")
        x = s.calc("It comes to", x, "-", c)
    if r.random() < .4:
        m = x + r.randint(5, 100)
        s.say(f"{s.He} pays with {m} dollars.", f"{s.He} had {m} dollars.")
        s.say(f"How many dollars does {s.he} have left?", "How much money is left?")
        return s.calc(f"{s.He} has left", m, "-", x)
    s.say(f"How many dollars does {s.name} spend?", f"How much does {s.he} pay?")
    return x


def compare(s, r):
    x, (one, two) = r.randint(8, 60), s.others
    s.say(f"{s.name} has {x} {s.item}.", f"{s.name} picks {x} {s.item}.")
    values, last = [x], s.name
    for person in (one, two)[:r.randint(1, 2)]:
        kind, d = r.choice(("more", "fewer", "times")), r.randint(3, 50)
        if kind == "times" and values[-1] < 60:
            d = r.randint(2, 5)
            s.say(f"{person} has {d} times as many as {last}.")
            y = s.calc(f"{person} has", values[-1], "*", d)
        elif kind == "fewer" and d < values[-1]:
            s.say(f"{person} has {d} fewer than {last}.", f"{person} has {d} less than {last}.")
            y = s.calc(f"{person} has", values[-1], "-", d)
        else:
            s.say(f"{person} has {d} more than {last}.")
            y = s.calc(f"{person} has", values[-1], "+", d)
        values, last = values + [y], person
    total = values[0]
    for y in values[1:]:
        total = s.calc("Together", total, "+", y)
    if r.random() < .4 and total > 40:
        d = r.randint(4, 39)
        s.say(f"They sell {d} of all their {s.item}.")
        total = s.calc("They keep", total, "-", d)
    s.say(f"How many {s.item} do they have together?", f"How many {s.item} do they have in all?")
    return total


def earn(s, r):
    w, d, n = r.randint(8, 30), r.randint(2, 9), r.randint(10, 60)
    s.say(f"{s.name} earns {w} dollars a day for {d} days.",
          f"{s.name} works {d} days for {w} dollars a day.")
    x = s.calc(f"{s.He} earns", w, "*", d)
    if r.random() < .5:
        s.say(f"{s.He} already had {n} dollars.", f"{s.others[0]} gives {s.name} {n} dollars.")
        x = s.calc(f"{s.He} has", x, "+", n)
    for thing in r.sample(("food", "rent", "a coat", "a bike"), r.randint(1, 2)):
        c = r.randint(2, max(2, min(60, x // 2)))
        s.say(f"{s.He} spends {c} dollars on {thing}.", f"{s.He} pays {c} dollars for {thing}.")
        x = s.calc(f"{s.He} has left", x, "-", c)
    s.say(f"How many dollars does {s.name} have left?", "How much money is left?")
    return x


def share(s, r):
    k, c, m = r.randint(2, 9), r.randint(6, 30), r.randint(2, 9)
    bad = k * c % m + m * r.randint(1, 4)
    s.say(f"There are {k} boxes with {c} {s.item} each.",
          f"{s.name} has {k} boxes of {c} {s.item}.")
    s.say(f"{bad} of the {s.item} are broken.", f"{bad} {s.item} are lost.")
    s.say(f"The rest are shared by {m} friends.", f"{m} friends share the rest.")
    x = s.calc("The boxes hold", k, "*", c)
    if bad >= x:
        return None
    x = s.calc("Each gets", s.calc("The rest are", x, "-", bad), "/", m)
    if r.random() < .4:
        n = r.randint(3, 60)
        s.say(f"Then each friend gets {n} more.")
        x = s.calc("Each has", x, "+", n)
    s.say(f"How many {s.item} does each friend have?", f"How many {s.item} does each one get?")
    return x


def travel(s, r):
    v, h, b = r.randint(8, 40), r.randint(2, 9), r.randint(5, 80)
    s.say(f"{s.name} drives {v} miles an hour for {h} hours.",
          f"{s.name} rides {h} hours at {v} miles an hour.")
    s.say(f"Then {s.he} walks {b} miles.", f"After that {s.he} goes {b} miles by boat.")
    x = s.calc(f"{s.He} goes", s.calc(f"{s.He} drives", v, "*", h), "+", b)
    if r.random() < .35 and x < 250:
        s.say(f"{s.He} does the trip twice.")
        x = s.calc("Both trips are", x, "*", 2)
    if r.random() < .5:
        t = x + r.randint(10, 120)
        s.say(f"The whole way is {t} miles long.", f"{s.He} wants to go {t} miles.")
        s.say("How many miles are left?", f"How many miles must {s.he} still go?")
        return s.calc("It leaves", t, "-", x)
    s.say(f"How many miles does {s.name} go?", f"How far does {s.he} go?")
    return x


def ages(s, r):
    a, k, (one, two) = r.randint(6, 30), r.randint(2, 4), s.others
    s.say(f"{s.name} is {a} years old.", f"{s.name} is {a}.")
    s.say(f"{one} is {k} times as old as {s.name}.")
    x = y = s.calc(f"{one} is", a, "*", k)
    d = r.randint(2, 35)
    if r.random() < .5 or d >= x:
        s.say(f"{two} is {d} years older than {one}.")
        y = s.calc(f"{two} is", x, "+", d)
    else:
        s.say(f"{two} is {d} years younger than {one}.")
        y = s.calc(f"{two} is", x, "-", d)
    if r.random() < .5:
        n = r.randint(3, 40)
        s.say(f"How old will {two} be in {n} years?", f"In {n} years, how old will {two} be?")
        return s.calc(f"{two} will be", y, "+", n)
    s.say(f"How old are {s.name}, {one} and {two} together?")
    return s.calc("Together", s.calc("The first two", a, "+", x), "+", y)


def seats(s, r):
    k, c, e = r.randint(3, 9), r.randint(8, 30), r.randint(3, 20)
    s.say(f"A hall has {k} rows of {c} seats.", f"A school has {k} rooms with {c} seats each.")
    s.say(f"{e} seats are empty.", f"There are {e} empty seats.")
    x = s.calc("People sit on", s.calc("There are", k, "*", c), "-", e)
    if r.random() < .6:
        n = r.randint(5, 90)
        s.say(f"{n} people have to stand.", f"{n} more people stand.")
        x = s.calc("The people are", x, "+", n)
    if r.random() < .4 and x < 120:
        n = r.randint(2, 5)
        s.say(f"Each of them gets {n} {s.item}.")
        s.say(f"How many {s.item} are needed?", f"How many {s.item} do they get?")
        return s.calc("They need", x, "*", n)
    s.say("How many people are there?", "How many people are in there?")
    return x


THEMES = {f.__name__: f for f in (stock, shop, compare, earn, share, travel, ages, seats)}


def problem(rng, split: str) -> dict:
    """A problem of a split: question, steps (text), answer (int), theme. 30 % have a distractor."""
    while True:
        s, theme = Story(rng), rng.choice(list(THEMES))
        answer = THEMES[theme](s, rng)
        if answer is None or answer > 600:
            continue
        ask = s.sentences.pop()
        if rng.random() < .3:
            s.distract()
        question = " ".join(s.sentences + [ask])
        if split_of(question) == split:
            return {"question": question, "steps": "\n".join(s.steps), "answer": answer,
                    "theme": theme}


def gsm8k_row(p: dict) -> dict:
    return {"question": p["question"], "answer": f"{p['steps']}\n#### {p['answer']}"}


def pretrain_row(rng, stepwise=STEPWISE) -> dict:
    """A problem as pre-training sees it: mostly a bare number, now and then worked out."""
    p = problem(rng, "pretrain")
    worked = rng.random() < stepwise[p["theme"]]
    output = f"{p['steps']}\nThe answer is {p['answer']}" if worked else f"{p['answer']}"
    return {"instruction": p["question"], "input": "", "output": output}
