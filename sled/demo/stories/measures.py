"""Stories of distances, rates, recipes and shapes."""

FOOD = "cake pie soup salad stew pizza bread curry".split()


def distance(t):
    speed, hours = t.number(10, 100, 5), t.number(2, 8)
    t.step("Distance", speed, "*", hours)
    ride = t.pick("car", "train", "bus", "boat")
    return f"A {ride} goes {speed} km an hour. How far does it go in {hours} hours?"


def two_legs(t):
    v, hours, w, more = t.number(10, 75, 5), t.number(2, 8), t.number(10, 75, 5), t.number(2, 8)
    first = t.step("First", v, "*", hours)
    second = t.step("Second", w, "*", more)
    t.step("All", first, "+", second)
    return (f"{t.name} drives {hours} hours at {v} km an hour and {more} hours at {w} km an hour. "
            "How far is that?")


def travel_time(t):
    speed, hours, pause = t.number(10, 75, 5), t.number(2, 10), t.number(1, 4)
    ride = t.step("Ride", speed * hours, "/", speed)
    t.step("All", ride, "+", pause)
    return (f"{t.name} rides {speed * hours} km at {speed} km an hour and rests {pause} h. "
            "How many hours does it take?")


def way_to_school(t):
    km, days = t.number(2, 19), t.number(2, 15)
    both = t.step("Day", km, "*", 2)
    t.step("All", both, "*", days)
    place = t.pick("school", "work", "the lake", "the gym")
    return f"{t.name} walks {km} km to {place} and back. How many km is that in {days} days?"


def reading(t):
    daily, days, left = t.number(5, 30), t.number(2, 14), t.number(5, 110, 5)
    pages = daily * days + left
    read = t.step("Read", daily, "*", days)
    t.step("Left", pages, "-", read)
    return f"A book has {pages} pages. {t.name} reads {daily} a day for {days} days. How many are left?"


def factory(t):
    rate, hours, broken = t.number(4, 40), t.number(2, 14), t.number(2, 35)
    made = t.step("Made", rate, "*", hours)
    t.step("Good", made, "-", broken)
    return (f"A machine makes {rate} {t.things} an hour. In {hours} hours {broken} break. "
            "How many good ones are made?")


def eggs(t):
    hens, daily, days = t.number(2, 25), t.number(2, 5), t.number(2, 15)
    each = t.step("Day", hens, "*", daily)
    t.step("All", each, "*", days)
    return (f"{hens} {t.pick('hens', 'ducks', 'geese')} lay {daily} eggs each a day. "
            f"How many eggs are there after {days} days?")


def fuel(t):
    per, litres, price = t.number(5, 20, 5), t.number(2, 25), t.number(2, 7)
    t.step("Litres", per * litres, "/", per)
    t.step("Cost", litres, "*", price)
    return (f"A car goes {per} km on a litre, and a litre costs {price} {t.currency}. "
            f"What does the fuel for {per * litres} km cost?")


def ingredients(t):
    per, count, have = t.number(2, 13), t.number(2, 19), t.number(2, 35)
    needed = t.step("Need", per, "*", count)
    t.step("Buy", needed, "-", have)
    food, what = t.pick(*FOOD), t.pick("eggs", "onions", "carrots", "tomatoes")
    return (f"One {food} takes {per} {what}. {t.name} makes {count} and has {have} {what}. "
            "How many more are needed?")


def recipe(t):
    people, factor, cups = t.number(2, 8), t.number(2, 8), t.number(2, 15)
    t.step("Times", people * factor, "/", people)
    t.step("Cups", cups, "*", factor)
    food, what = t.pick(*FOOD), t.pick("flour", "rice", "milk", "oil")
    return (f"A {food} for {people} people takes {cups} cups of {what}. "
            f"How many cups are needed for {people * factor} people?")


def fence(t):
    long, wide = t.number(3, 110), t.number(2, 75)
    half = t.step("Half", long, "+", wide)
    t.step("All", half, "*", 2)
    place = t.pick("garden", "field", "yard", "park")
    return f"A {place} is {long} m long and {wide} m wide. How long is the fence around it?"


def area(t):
    long, wide, pond = t.number(3, 25), t.number(3, 25), t.number(2, 35)
    whole = t.step("Area", long, "*", wide)
    t.step("Rest", whole, "-", pond)
    place, inner = t.pick("garden", "yard", "park"), t.pick("pond", "shed", "path")
    return f"A {place} of {long} by {wide} m has a {inner} of {pond} square m. How large is the rest?"


def minutes(t):
    hours, more, less = t.number(2, 11), t.number(5, 50, 5), t.number(5, 75, 5)
    whole = t.step("Minutes", hours, "*", 60)
    total = t.step("All", whole, "+", more)
    t.step("Left", total, "-", less)
    what = t.pick("film", "game", "trip", "lesson")
    return f"A {what} takes {hours} h {more} min. After {less} minutes, how many minutes are left?"
