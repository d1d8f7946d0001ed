"""Capo as one would write it first: dictionaries, string formatting, a tokenizer, lists.

It shares with the task the text files and the ids of the vocabulary, and nothing else: people, templates, orders and tokens are its
own. Its windows have the law of the task's training windows.
"""

import random
import re

from src.datamodules.tasks.capo_people import DIRECTORY
from src.datamodules.tasks.capo_writing import vocabulary

PIECE = re.compile(r"'s| ?[A-Za-z]+| ?\d+| ?[^A-Za-z\d ]")
FACTS = ["birthday", "birth_city", "university", "field", "employer_city", "employer"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]


def lines(name):
    return (DIRECTORY / f"{name}.txt").read_text().splitlines()


FIRST, MIDDLE, LAST = lines("first_names"), lines("middle_names"), lines("last_names")
CITIES, UNIVERSITIES, FIELDS, EMPLOYERS = lines("cities"), lines("universities"), lines("fields"), lines("employers")
TEMPLATES = {fact: lines(f"templates_{fact}") for fact in FACTS}
IDS = vocabulary().ids


def make_person(rng, number, names):
    while True:
        name = f"{rng.choice(FIRST)} {rng.choice(MIDDLE)} {rng.choice(LAST)}"
        if name not in names:
            names.add(name)
            break
    employer, city = rng.choice(EMPLOYERS).split("; ")
    return {
        "name": name,
        "male": number % 2 == 0,
        "birthday": f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1900, 2099)}",
        "birth_city": rng.choice(CITIES),
        "university": rng.choice(UNIVERSITIES),
        "field": rng.choice(FIELDS),
        "employer_city": city,
        "employer": employer,
    }


def biography(rng, person, permute):
    facts = list(FACTS)
    if permute:
        rng.shuffle(facts)
    text = ""
    for place, fact in enumerate(facts):
        template = rng.choice(TEMPLATES[fact])
        if place == 0:
            template = template.replace("{subject}", person["name"]).replace("{subject's}", person["name"] + "'s")
        else:
            template = template.replace("{subject}", "He" if person["male"] else "She")
            template = template.replace("{subject's}", "His" if person["male"] else "Her")
        text += " " + template.replace("{value}", person[fact])
    return text


def tokenize(text):
    return [IDS[piece] for piece in PIECE.findall(text)]


def windows(task, rng: random.Random, count: int, length: int):
    """The first ``count`` training windows of some seed: tokens, loss mask, segments, each a list of lists."""
    per_window = task.examples_per_window("train", length)
    needed = min(count * per_window, task.num_people * task.exposures)
    order = []
    while len(order) < needed:
        order += rng.sample(range(task.num_people), min(needed - len(order), task.num_people))
    people, names = {}, set()
    tokens, mask, segments = [], [], []
    for window in range(count):
        row, row_segments = [], []
        told = order[window * per_window : (window + 1) * per_window]
        for place, number in enumerate(told):
            if number not in people:
                people[number] = make_person(rng, number, names)
            ids = [0, *tokenize(biography(rng, people[number], task.permute))]
            row += ids
            row_segments += [place] * len(ids)
        padding = length - len(row)
        tokens.append((row + [0] * padding)[:length])
        mask.append(([True] * len(row) + [False] * padding)[:length])
        segments.append((row_segments + [len(told)] * padding)[:length])
    return tokens, mask, segments
