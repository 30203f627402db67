"""The stories behind the word problems of `problems.py`, which imports this file and tells them.

A story gets a telling `t` and returns its question. `t.number` draws a quantity, which counts towards the
split; `t.step` writes a step of the solution down and computes it, the last one being the answer; `t.pick`,
`t.name`, `t.things` and the like draw what does not matter; `t.need` draws all anew unless something holds.
"""

from __future__ import annotations

from collections.abc import Callable

FOOD = "cake pie soup salad stew pizza bread curry".split()
WORDS = {3: "three", 4: "four", 5: "five", 6: "six"}
PARTS = {2: "Half", 3: "A third", 4: "A quarter", 5: "A fifth"}

STORIES: dict[str, Callable[..., str]] = {}


def _story(tell: Callable[..., str]):
    STORIES[tell.__name__] = tell
    return tell


# Shopping


@_story
def cost(t):
    n, price = t.number(2, 12), t.number(2, 15)
    t.step("Cost", n, "*", price)
    who, things, coins = t.name, t.things, t.currency
    return t.pick(f"{who} buys {n} {things} at {price} {coins} each. How much is that?",
                  f"{who} buys {n} packs of {things}. A pack costs {price} {coins}. How much is that?")


@_story
def discount_for_many(t):
    n, price, percent, least = t.number(2, 9), t.number(5, 30, 5), t.number(10, 50, 10), t.number(3, 6)
    full = t.step("Cost", n, "*", price)
    if n >= least:
        off = t.step("Off", full, "%", percent)
        t.step("Pay", full, "-", off)
    return (f"{t.name} buys {n} {t.things} at {price} {t.currency} each, "
            f"{percent}% off for {WORDS[least]} or more: how much?")


@_story
def sale(t):
    price, percent = t.number(10, 200, 10), t.number(10, 90, 10)
    off = t.step("Off", price, "%", percent)
    t.step("Pay", price, "-", off)
    what = t.pick("coat", "bike", "lamp", "watch", "chair", "bag")
    return t.pick(f"A {what} costs {price} {t.currency}. Now it is {percent}% off. What is the price?",
                  f"{t.name} buys a {what} of {price} {t.currency} with {percent}% off. How much is paid?")


@_story
def price_rise(t):
    price, percent = t.number(10, 200, 10), t.number(10, 50, 10)
    more = t.step("More", price, "%", percent)
    t.step("Price", price, "+", more)
    what = t.pick("ticket", "room", "phone", "pass", "meal")
    return f"A {what} cost {price} {t.currency}, and the price went up by {percent}%. What does it cost now?"


@_story
def two_goods(t):
    n, p, m, q = t.number(2, 9), t.number(2, 12), t.number(2, 9), t.number(2, 12)
    first = t.step("First", n, "*", p)
    second = t.step("Second", m, "*", q)
    t.step("All", first, "+", second)
    one, two = t.two_things
    coins = t.currency
    return (f"{t.name} buys {n} {one} for {p} {coins} each and {m} {two} for {q} {coins} each. "
            "How much is it in all?")


@_story
def change(t):
    n, price, cash = t.number(2, 9), t.number(2, 12), t.number(20, 100, 10)
    paid = t.step("Cost", n, "*", price)
    t.step("Change", cash, "-", paid)
    coins = t.currency
    return (f"{t.name} pays {n} {t.things} of {price} {coins} each with {cash} {coins}. "
            "How much change is there?")


@_story
def coupon(t):
    n, price, off = t.number(2, 9), t.number(3, 12), t.number(2, 12)
    full = t.step("Cost", n, "*", price)
    t.step("Pay", full, "-", off)
    coins = t.currency
    return (f"{n} {t.things} cost {price} {coins} each. {t.name} has a coupon for {off} {coins}. "
            "How much is left to pay?")


@_story
def packs(t):
    size, count, price = t.number(2, 12), t.number(2, 9), t.number(2, 12)
    needed = size * count
    t.step("Packs", needed, "/", size)
    t.step("Cost", count, "*", price)
    return (f"{t.name} needs {needed} {t.things}. They come in packs of {size}, and a pack costs "
            f"{price} {t.currency}. How much is it?")


@_story
def bill(t):
    food, drinks, friends = t.number(10, 60, 2), t.number(4, 30, 2), t.number(2, 5)
    total = t.step("Bill", food, "+", drinks)
    t.step("Each", total, "/", friends)
    coins = t.currency
    return (f"{friends} friends share a bill: {food} {coins} for food and {drinks} {coins} for drinks. "
            "How much does each pay?")


@_story
def tickets(t):
    adults, kids, price = t.number(2, 6), t.number(2, 8), t.number(4, 20, 2)
    half = t.step("Child", price, "/", 2)
    first = t.step("Adults", adults, "*", price)
    second = t.step("Kids", kids, "*", half)
    t.step("All", first, "+", second)
    place = t.pick("zoo", "fair", "museum", "show")
    return (f"A {place} ticket is {price} {t.currency}, and children pay half. What do {adults} adults and "
            f"{kids} children pay?")


@_story
def membership(t):
    fee, monthly, months = t.number(5, 50, 5), t.number(3, 12), t.number(2, 12)
    total = t.step("Months", monthly, "*", months)
    t.step("All", total, "+", fee)
    club = t.pick("gym", "chess club", "library", "pool")
    return (f"A {club} asks {fee} {t.currency} to join and {monthly} a month. What does {t.name} pay "
            f"for {months} months?")


# Sharing and counting


@_story
def sharing(t):
    each, kids = t.number(2, 12), t.number(2, 12)
    t.step("Each", each * kids, "/", kids)
    total, things = each * kids, t.things
    return t.pick(f"{t.name} shares {total} {things} equally among {kids} friends. How many does each get?",
                  f"{total} {things} go into {kids} bags, the same in each. How many are in a bag?")


@_story
def sharing_the_rest(t):
    each, kids, kept = t.number(2, 12), t.number(2, 9), t.number(2, 12)
    total = each * kids + kept
    rest = t.step("Rest", total, "-", kept)
    t.step("Each", rest, "/", kids)
    return (f"{t.name} has {total} {t.things}, keeps {kept} and shares the rest among {kids} friends. "
            "How many does each friend get?")


@_story
def boxes(t):
    count, size, loose = t.number(2, 12), t.number(2, 12), t.number(2, 12)
    packed = t.step("Packed", count, "*", size)
    t.step("All", packed, "+", loose)
    return f"{t.name} has {count} boxes with {size} {t.things} each, and {loose} loose ones. How many in all?"


@_story
def times_as_many(t):
    n, factor = t.number(2, 15), t.number(2, 6)
    a, b = t.two_names
    second = t.step(b, n, "*", factor)
    things = t.things
    if t.number(0, 1):
        t.step("Both", n, "+", second)
        return f"{a} has {n} {things}. {b} has {factor} times as many. How many do they have together?"
    t.step("More", second, "-", n)
    return f"{a} has {n} {things}, {b} {factor} times as many. How many more does {b} have?"


@_story
def fewer(t):
    n, less = t.number(10, 40), t.number(2, 20)
    a, b = t.two_names
    second = t.step(b, n, "-", less)
    t.step("Both", n, "+", second)
    things = t.things
    return f"{a} has {n} {things}. {b} has {less} fewer. How many do they have together?"


@_story
def found_and_lost(t):
    n, found, lost = t.number(5, 40), t.number(2, 20), t.number(2, 20)
    more = t.step("Then", n, "+", found)
    t.step("Left", more, "-", lost)
    return t.pick(f"{t.name} has {n} {t.things}, finds {found} and loses {lost}. How many are left?",
                  f"A shop has {n} {t.things}, gets {found} more and sells {lost}. How many are there now?")


@_story
def bus(t):
    n, off, on = t.number(10, 40), t.number(2, 15), t.number(2, 15)
    left = t.step("Stay", n, "-", off)
    t.step("Now", left, "+", on)
    ride = t.pick("bus", "train", "boat", "tram")
    return f"{n} people are on a {ride}. {off} get off and {on} get on. How many are on it now?"


@_story
def part_of_a_class(t):
    part, size = t.number(2, 5), t.number(2, 15)
    n = part * size
    away = t.step("Part", n, "/", part)
    group, act = t.pick("class", "club", "team", "group"), t.pick("sing", "swim", "dance", "read")
    if t.number(0, 1):
        t.step("Rest", n, "-", away)
        return f"{PARTS[part]} of a {group} of {n} {act}. How many do not?"
    return f"{PARTS[part]} of a {group} of {n} {act}. How many is that?"


@_story
def chairs(t):
    rows, seats, empty = t.number(2, 12), t.number(3, 12), t.number(2, 12)
    total = t.step("Seats", rows, "*", seats)
    t.step("Taken", total, "-", empty)
    room = t.pick("hall", "cinema", "theatre", "tent")
    return f"A {room} has {rows} rows of {seats} seats. {empty} seats are empty. How many are taken?"


@_story
def legs(t):
    birds, beasts = t.number(2, 15), t.number(2, 15)
    two, four = t.pick("hens", "ducks", "geese"), t.pick("cows", "goats", "sheep", "dogs")
    first = t.step(two.capitalize(), birds, "*", 2)
    second = t.step(four.capitalize(), beasts, "*", 4)
    t.step("Legs", first, "+", second)
    return f"On a farm are {birds} {two} and {beasts} {four}. How many legs do they have in all?"


@_story
def average(t):
    a, b, c = t.number(2, 20), t.number(2, 20), t.number(2, 20)
    t.need((a + b + c) % 3 == 0)
    two = t.step("Two", a, "+", b)
    total = t.step("All", two, "+", c)
    t.step("Average", total, "/", 3)
    what = t.pick("points", "goals", "fish", "pages")
    return f"{t.name} has {a}, {b} and {c} {what} on three days. What is the average?"


@_story
def cuts(t):
    length, pieces = t.number(2, 12), t.number(3, 12)
    t.step("Pieces", length * pieces, "/", length)
    t.step("Cuts", pieces, "-", 1)
    what = t.pick("rope", "log", "ribbon", "board")
    return f"A {what} of {length * pieces} m is cut into pieces of {length} m. How many cuts does it take?"


@_story
def score(t):
    wins, draws, per = t.number(2, 12), t.number(2, 12), t.number(2, 5)
    points = t.step("Wins", wins, "*", per)
    t.step("Points", points, "+", draws)
    return (f"A win gives {per} points and a draw one. {t.name} has {wins} wins and {draws} draws. "
            "How many points is that?")


# Ages and savings


@_story
def age_later(t):
    age, older, years = t.number(3, 30), t.number(2, 15), t.number(2, 15)
    a, b = t.two_names
    now = t.step("Now", age, "+", older)
    t.step("Later", now, "+", years)
    return f"{a} is {age} years old. {b} is {older} years older. How old is {b} in {years} years?"


@_story
def age_times(t):
    age, factor = t.number(3, 15), t.number(2, 6)
    who, elder = t.name, t.pick("mother", "father", "aunt", "teacher")
    old = t.step(elder.capitalize(), age, "*", factor)
    t.step("Older", old, "-", age)
    return (f"{who} is {age}. The {elder} of {who} is {factor} times as old. "
            f"By how many years is the {elder} older?")


@_story
def saving(t):
    start, weekly, weeks = t.number(5, 50, 5), t.number(2, 12), t.number(2, 12)
    saved = t.step("Saved", weekly, "*", weeks)
    t.step("All", saved, "+", start)
    coins = t.currency
    return (f"{t.name} has {start} {coins} and saves {weekly} {coins} a week. "
            f"How much is it after {weeks} weeks?")


@_story
def saving_for(t):
    have, weekly, weeks = t.number(5, 50, 5), t.number(2, 12), t.number(2, 12)
    price = have + weekly * weeks
    missing = t.step("Missing", price, "-", have)
    t.step("Weeks", missing, "/", weekly)
    what = t.pick("bike", "game", "guitar", "camera")
    return (f"A {what} costs {price} {t.currency}. {t.name} has {have} and saves {weekly} a week. "
            "After how many weeks is it enough?")


@_story
def wages(t):
    hours, rate, tip = t.number(2, 10), t.number(5, 15), t.number(2, 12)
    pay = t.step("Pay", hours, "*", rate)
    t.step("All", pay, "+", tip)
    coins = t.currency
    return (f"{t.name} works {hours} hours for {rate} {coins} an hour and gets {tip} {coins} in tips. "
            "How much is it in all?")


@_story
def overtime(t):
    hours, more, rate, extra = t.number(4, 8), t.number(2, 6), t.number(5, 12), t.number(2, 8)
    pay = t.step("Pay", hours, "*", rate)
    late_rate = t.step("Rate", rate, "+", extra)
    late = t.step("Extra", more, "*", late_rate)
    t.step("All", pay, "+", late)
    return (f"{t.name} works {hours} hours for {rate} {t.currency} an hour, then {more} hours for {extra} "
            "more an hour. How much is earned?")


# Distances, rates, recipes, shapes


@_story
def distance(t):
    speed, hours = t.number(10, 90, 5), t.number(2, 6)
    t.step("Distance", speed, "*", hours)
    ride = t.pick("car", "train", "bus", "boat")
    return f"A {ride} goes {speed} km an hour. How far does it go in {hours} hours?"


@_story
def two_legs(t):
    v, hours, w, more = t.number(10, 60, 10), t.number(2, 5), t.number(10, 60, 10), t.number(2, 5)
    first = t.step("First", v, "*", hours)
    second = t.step("Second", w, "*", more)
    t.step("All", first, "+", second)
    return (f"{t.name} drives {hours} hours at {v} km an hour and {more} hours at {w} km an hour. "
            "How far is that?")


@_story
def travel_time(t):
    speed, hours, pause = t.number(10, 60, 10), t.number(2, 9), t.number(1, 4)
    ride = t.step("Ride", speed * hours, "/", speed)
    t.step("All", ride, "+", pause)
    return (f"{t.name} rides {speed * hours} km at {speed} km an hour and rests {pause} h. "
            "How many hours does it take?")


@_story
def way_to_school(t):
    km, days = t.number(2, 15), t.number(2, 7)
    both = t.step("Day", km, "*", 2)
    t.step("All", both, "*", days)
    place = t.pick("school", "work", "the lake", "the gym")
    return f"{t.name} walks {km} km to {place} and back. How many km is that in {days} days?"


@_story
def reading(t):
    daily, days, left = t.number(5, 15), t.number(2, 8), t.number(5, 50, 5)
    pages = daily * days + left
    read = t.step("Read", daily, "*", days)
    t.step("Left", pages, "-", read)
    return f"A book has {pages} pages. {t.name} reads {daily} a day for {days} days. How many are left?"


@_story
def factory(t):
    rate, hours, broken = t.number(4, 15), t.number(2, 8), t.number(2, 12)
    made = t.step("Made", rate, "*", hours)
    t.step("Good", made, "-", broken)
    return (f"A machine makes {rate} {t.things} an hour. In {hours} hours {broken} break. "
            "How many good ones are made?")


@_story
def eggs(t):
    hens, daily, days = t.number(2, 9), t.number(2, 4), t.number(2, 7)
    each = t.step("Day", hens, "*", daily)
    t.step("All", each, "*", days)
    return (f"{hens} {t.pick('hens', 'ducks', 'geese')} lay {daily} eggs each a day. "
            f"How many eggs are there after {days} days?")


@_story
def fuel(t):
    per, litres, price = t.number(5, 20, 5), t.number(2, 12), t.number(2, 5)
    t.step("Litres", per * litres, "/", per)
    t.step("Cost", litres, "*", price)
    return (f"A car goes {per} km on a litre, and a litre costs {price} {t.currency}. "
            f"What does the fuel for {per * litres} km cost?")


@_story
def ingredients(t):
    per, count, have = t.number(2, 9), t.number(2, 9), t.number(2, 12)
    needed = t.step("Need", per, "*", count)
    t.step("Buy", needed, "-", have)
    food, what = t.pick(*FOOD), t.pick("eggs", "onions", "carrots", "tomatoes")
    return (f"One {food} takes {per} {what}. {t.name} makes {count} and has {have} {what}. "
            "How many more are needed?")


@_story
def recipe(t):
    people, factor, cups = t.number(2, 6), t.number(2, 6), t.number(2, 9)
    t.step("Times", people * factor, "/", people)
    t.step("Cups", cups, "*", factor)
    food, what = t.pick(*FOOD), t.pick("flour", "rice", "milk", "oil")
    return (f"A {food} for {people} people takes {cups} cups of {what}. "
            f"How many cups are needed for {people * factor} people?")


@_story
def fence(t):
    long, wide = t.number(3, 30), t.number(2, 20)
    half = t.step("Half", long, "+", wide)
    t.step("All", half, "*", 2)
    place = t.pick("garden", "field", "yard", "park")
    return f"A {place} is {long} m long and {wide} m wide. How long is the fence around it?"


@_story
def area(t):
    long, wide, pond = t.number(3, 12), t.number(3, 12), t.number(2, 12)
    whole = t.step("Area", long, "*", wide)
    t.step("Rest", whole, "-", pond)
    place, inner = t.pick("garden", "yard", "park"), t.pick("pond", "shed", "path")
    return f"A {place} of {long} by {wide} m has a {inner} of {pond} square m. How large is the rest?"


@_story
def minutes(t):
    hours, more, less = t.number(2, 5), t.number(10, 50, 10), t.number(5, 60, 5)
    whole = t.step("Minutes", hours, "*", 60)
    total = t.step("All", whole, "+", more)
    t.step("Left", total, "-", less)
    what = t.pick("film", "game", "trip", "lesson")
    return f"A {what} takes {hours} h {more} min. After {less} minutes, how many minutes are left?"
